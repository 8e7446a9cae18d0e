# The CUDA kernels, compiled into libhvd_syncbn where there is a CUDA compiler.
#
# The CUDA runtime is linked statically, so it works beside whichever one a framework brings. Binaries of one major version
# run on its later minor ones, so these cover Turing to Blackwell; newer devices compile the PTX of the last.
set(HVD_SYNCBN_CUDA "auto" CACHE STRING "CUDA kernels: on, off, or auto (on where a CUDA compiler is found)")
set_property(CACHE HVD_SYNCBN_CUDA PROPERTY STRINGS auto on off)
if(HVD_SYNCBN_CUDA STREQUAL "off")
  message(STATUS "hvd-syncbn: without CUDA, as asked for")
  return()
endif()
include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  if(HVD_SYNCBN_CUDA STREQUAL "on")
    message(FATAL_ERROR "hvd-syncbn: HVD_SYNCBN_CUDA=on, and there is no CUDA compiler (nvcc on PATH, or CUDACXX)")
  endif()
  message(STATUS "hvd-syncbn: no CUDA compiler, building without CUDA")
  return()
endif()
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES 75-real 80-real 90-real 100-real 120)
endif()
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)
message(STATUS "hvd-syncbn: CUDA ${CMAKE_CUDA_COMPILER_VERSION}, architectures ${CMAKE_CUDA_ARCHITECTURES}")

set(cuda_kernels forward_moments.cu forward_apply.cu backward_moments.cu backward_apply.cu reports.cu)
list(TRANSFORM cuda_kernels PREPEND ${CMAKE_CURRENT_LIST_DIR}/)
add_library(hvd_syncbn_cuda OBJECT ${cuda_kernels})
set_target_properties(hvd_syncbn_cuda PROPERTIES CUDA_STANDARD 17 CUDA_VISIBILITY_PRESET hidden)
# Results are bits here, too: fused operations only where written, IEEE division, square root and denormals.
target_compile_options(hvd_syncbn_cuda PRIVATE
  --fmad=false --ftz=false --prec-div=true --prec-sqrt=true -Xcompiler=-Wall -Xcompiler=-ffp-contract=off)
target_sources(hvd_syncbn PRIVATE $<TARGET_OBJECTS:hvd_syncbn_cuda>)
target_link_libraries(hvd_syncbn PRIVATE CUDA::cudart_static)
set_target_properties(hvd_syncbn PROPERTIES LINKER_LANGUAGE CXX)
