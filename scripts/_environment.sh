# Sourced by the scripts beside it: finds a Python, has _environment.py make an environment for it, and names both.
# One way of making environments; bash 3.2 (macOS) is enough.

# The repository, wherever it was called from.
root=$(CDPATH='' cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)

# Newest first: the Pythons that jax publishes wheels for. A newer Python is used only when named with --python.
python_versions="3.14 3.13 3.12 3.11"

# Nothing from outside may change what the environment's Python imports.
unset PYTHONHOME PYTHONPATH
export PYTHONNOUSERSITE=1
# pip leaves it to the first import to compile a module (see _environment.py). Where that is not kept, every process, of which
# the tests start many, compiles jax and all else again.
unset PYTHONDONTWRITEBYTECODE

die() {
    echo "$(basename -- "$0"): $*" >&2
    exit 2
}

# probe_python COMMAND: prints "3.13 /real/executable" if COMMAND really runs (a pyenv shim may not) and can make an
# environment that wheels exist for: a release, with the GIL, with ssl, venv and ensurepip.
probe_python() {
    "$1" -I -c '
import sys, sysconfig
import ensurepip, ssl, venv
assert sys.version_info >= (3, 11) and sys.version_info.releaselevel == "final"
assert sys.implementation.name == "cpython" and not sysconfig.get_config_var("Py_GIL_DISABLED")
print("%d.%d" % sys.version_info[:2], sys.executable)
' 2>/dev/null </dev/null
}

# commands_for VERSION: every place where a Python of that version may be, one a line.
commands_for() {
    type -aP "python$1" || true
    local command
    for command in "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$1".*/bin/python; do
        if [ -x "$command" ]; then echo "$command"; fi
    done
    type -aP python3 python || true
}

# find_python [VERSION | COMMAND | PATH]: prints "VERSION EXECUTABLE" of the one asked for, or of the newest found.
find_python() {
    local wanted=${1:-} versions=$python_versions version command found
    case $wanted in
        "") ;;
        3.[0-9] | 3.[0-9][0-9]) versions=$wanted ;;
        *)
            command=$(type -P "$wanted") || die "--python $wanted: no such command (give a version such as 3.11, or a path)"
            probe_python "$command" || die "--python $wanted: not a CPython 3.11 or newer with ssl, venv and ensurepip"
            return
            ;;
    esac
    for version in $versions; do
        while IFS= read -r command; do
            found=$(probe_python "$command") || continue
            if [ "${found%% *}" = "$version" ]; then
                echo "$found"
                return
            fi
        done <<EOF
$(commands_for "$version")
EOF
    done
    die "found no usable CPython among $versions on PATH and in pyenv; name one with --python PATH"
}

# enter_environment PYTHON SUFFIX EXTRAS [JAX]: sets env_python to the Python of .venv/pyX.YSUFFIX, in which jaxmoe and its
# EXTRAS (comma-separated, may be empty) are installed, with that version of jax where one is given. PYTHON is what
# find_python takes.
enter_environment() {
    local found environment jax=${4:-}
    found=$(find_python "$1") || exit
    environment=$root/.venv/py${found%% *}${jax:+-jax$jax}$2
    "${found#* }" -I "$root/scripts/_environment.py" "$environment" "$3" "$jax" || exit
    env_python=$environment/bin/python
}
