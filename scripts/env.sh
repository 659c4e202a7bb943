# Sourced by scripts/demo and scripts/test: finds a Python, makes .venv beside the package, installs into it once.
# A stamp holds the hash of what was installed, so a second call starts at once.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

# What is imported is compiled once, also for a caller who wants no compiled files beside the sources: compiled at each
# start, the libraries of a stage take up to 7 s more.
if [ -n "${PYTHONDONTWRITEBYTECODE:-}" ]; then
  unset PYTHONDONTWRITEBYTECODE
  export PYTHONPYCACHEPREFIX="$PWD/.venv/bytecode"
fi

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3.13 python3.12 python3.11 python3.10 python3 python; do
    [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 || continue
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2])' 2>/dev/null; then
      command -v "$candidate"
      return 0
    fi
  done
  echo "No Python 3.10 or newer with venv was found. Install one (macOS: brew install python@3.12;" >&2
  echo "Debian or Ubuntu: apt-get install python3 python3-venv), or set PYTHON to its path." >&2
  return 1
}

# install EXTRAS [PACKAGE…]: the package with its extras (such as "[test]"), and further packages, into .venv.
install() {
  local extras="$1" python wanted
  shift
  if [ ! -x .venv/bin/python ] || ! .venv/bin/python -c '' 2>/dev/null; then
    python="$(find_python)" || exit 1
    echo "Making .venv with $python"
    "$python" -m venv --clear .venv || exit 1
  fi
  wanted="$(cat pyproject.toml constraints.txt <(echo "$extras $* $PWD") | cksum)"
  if [ "$(cat ".venv/installed$extras" 2>/dev/null)" != "$wanted" ]; then
    echo "Installing into .venv (once, a minute or two)"
    # Python compiles what is imported, once; compiling all that is installed takes longer than installing it.
    .venv/bin/python -m pip install -q --no-compile --disable-pip-version-check -c constraints.txt -e ".$extras" "$@" || {
      echo "The tested versions did not install; trying the newest that pyproject.toml allows." >&2
      .venv/bin/python -m pip install -q --no-compile --disable-pip-version-check -e ".$extras" "$@" || exit 1
    }
    echo "$wanted" >".venv/installed$extras"
  fi
}
