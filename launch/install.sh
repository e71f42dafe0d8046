# shellcheck shell=bash
# Sourced by the other scripts here: makes .venv in the repository root, installs dFactory with pinned versions and
# puts it first on PATH. Sets REPO. A second run does nothing unless the versions or the packaging have changed.

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

find_python() {
    local candidate
    for candidate in python3.11 python3 python; do
        if command -v "$candidate" >/dev/null &&
            "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return 0
        fi
    done
    echo "launch/install.sh: no Python 3.11 or newer on PATH: install python3.11 with its venv module" >&2
    return 1
}

install_dfactory() {
    local venv="$REPO/.venv" constraints="$REPO/launch/constraints.txt" python wanted
    wanted=$(cd "$REPO" && cat setup.cfg pyproject.toml launch/constraints.txt | sha256sum | cut -d' ' -f1)
    if [ "$(cat "$venv/installed" 2>/dev/null)" != "$wanted" ]; then
        python=$(find_python) || return 1
        [ -x "$venv/bin/python" ] || "$python" -m venv "$venv" || {
            echo "launch/install.sh: $python cannot make $venv: install its venv module (python3.11-venv)" >&2
            return 1
        }
        # torch comes first: some packages look for it while they are being built
        "$venv/bin/python" -m pip install -c "$constraints" torch || return 1
        "$venv/bin/python" -m pip install -c "$constraints" -e "${REPO}[rl,trackers,dev,docs]" || return 1
        echo "$wanted" >"$venv/installed"
    fi
    export PATH="$venv/bin:$PATH"
    unset PYTHONHOME
}

install_dfactory
