# hvd-syncbn, Horovod and the frameworks in an image without a compiler: the first stage builds, the second installs its wheels.
#
#   docker build -t hvd-syncbn .
#   docker build -t hvd-syncbn-cuda --build-arg FRAMEWORKS="torch==2.13.0" \
#     --build-arg BUILD_IMAGE=nvidia/cuda:13.0.1-devel-ubuntu24.04 --build-arg IMAGE=nvidia/cuda:13.0.1-base-ubuntu24.04 .
#
# Both images need the same Python version. FRAMEWORKS are the packages of PyTorch and TensorFlow; PIP_EXTRA_INDEX_URL is an
# index for them, such as PyTorch's for its CPU build.
ARG IMAGE=python:3.11-slim
ARG BUILD_IMAGE=${IMAGE}

FROM ${BUILD_IMAGE} AS build
ARG FRAMEWORKS="torch==2.13.0 tensorflow-cpu==2.21.0 keras==3.15.1"
ARG PIP_EXTRA_INDEX_URL
WORKDIR /src
COPY tools/system_deps.sh tools/
RUN tools/system_deps.sh /build
RUN /build/bin/python -m pip install $FRAMEWORKS numpy rich packaging cloudpickle psutil pyyaml \
    cmake ninja scikit-build-core setuptools wheel
COPY . .
RUN /build/bin/python -m hvd_syncbn.horovod_build
RUN /build/bin/python -m pip install --no-build-isolation --no-deps .
RUN cd / && /build/bin/hvd-syncbn bundle /wheels

FROM ${IMAGE}
RUN apt-get update \
    && apt-get install -y --no-install-recommends openssh-client $(command -v python3 >/dev/null || echo python3 python3-venv) \
    && rm -rf /var/lib/apt/lists/*
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    python3 -m venv /opt/hvd-syncbn \
    && /opt/hvd-syncbn/bin/python -m pip install --no-cache-dir --no-index --find-links /wheels -r /wheels/requirements.txt
ENV PATH=/opt/hvd-syncbn/bin:$PATH
RUN hvd-syncbn verify
