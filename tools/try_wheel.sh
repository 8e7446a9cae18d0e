#!/bin/bash
# Builds the sdist, from it the wheel, installs that into a fresh environment outside the checkout, and runs its tests there.
#
#   tools/try_wheel.sh [PYTHON [PYTEST-ARGUMENTS...]]       default: .venv/bin/python, and all of tests/
#
# PYTHON has the frameworks, Horovod and the tools. The fresh environment borrows them: a .pth file with PYTHON's site-packages,
# which Python reads after the environment's own; an editable install of this package there is not borrowed, as .pth files
# in borrowed folders are not read. The tests run in a copy of what the sdist has beside the package's sources: a checkout's
# folder hvd_syncbn would hide the installed package. Tests that need those sources are skipped, and say so.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "${1:-.venv/bin/python}")
shift || true
work=$(mktemp -d "${TMPDIR:-/tmp}/try-wheel-XXXXXX")
trap 'rm -rf "$work"' EXIT

echo "== sdist"
"$python" -c "from scikit_build_core.build import build_sdist; build_sdist('$work/dist')" > "$work/log" 2>&1 || { cat "$work/log"; exit 1; }
mkdir "$work/source"
tar -xzf "$work"/dist/*.tar.gz -C "$work/source" --strip-components=1
if [ -e .git ]; then # whole: every file that git knows or would add
  diff <(git ls-files --cached --others --exclude-standard | grep -v '^hvd_syncbn/t[a-z]*_impl$' | LC_ALL=C sort) <(cd "$work/source" && find . -type f -printf '%P\n' | grep -v -e '^PKG-INFO$' -e '^hvd_syncbn/t[a-z]*_impl/' | LC_ALL=C sort)
fi

echo "== wheel, from the sdist"
"$python" -m pip wheel -q --disable-pip-version-check --no-build-isolation --no-deps -w "$work/dist" "$work"/dist/*.tar.gz
"$python" -m zipfile -l "$work"/dist/*.whl | awk 'NR > 1 {print $1}' > "$work/files"
grep -E '\.so$|py\.typed$' "$work/files"
grep -q '^hvd_syncbn/py.typed$' "$work/files"

echo "== a fresh environment with it"
"$python" -m venv "$work/env"
borrowed=$("$python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
packages=$("$work/env/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
"$work/env/bin/python" -m pip install -q --disable-pip-version-check --no-index --no-deps "$work"/dist/*.whl
echo "$borrowed" > "$packages/borrowed.pth"
sed "1s|.*|#!$work/env/bin/python|" "$(dirname "$python")/horovodrun" > "$work/env/bin/horovodrun"
chmod +x "$work/env/bin/horovodrun"

echo "== its tests"
mkdir "$work/copy"
(cd "$work/source" && find . -mindepth 1 -maxdepth 1 ! -name hvd_syncbn ! -name torch_impl ! -name tf_impl ! -name CMakeLists.txt \
  -exec cp -r {} "$work/copy" \;)
cd "$work/copy"
export PATH="$work/env/bin:$(dirname "$python"):$PATH"
python -c "import hvd_syncbn, sys; assert hvd_syncbn.__file__.startswith('$work/env'), hvd_syncbn.__file__"
hvd-syncbn verify -np 2
python -m pytest "${@:-tests}"
