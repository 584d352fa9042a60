#!/usr/bin/env bash
# The eager path on the oldest versions we promise: torch 2.4 (what MLU370 machines have) and transformers 4.46.
# Ends in a block of markdown for docs/floor.md. The first run downloads several gigabytes (torch 2.4.1 with CUDA).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv-floor
tests=(tests --ignore tests/scripts --ignore tests/test_repository.py) # all but what trains the shipped model and what looks at files
requirements=(
    torch==2.4.1 transformers==4.46.3 "numpy<2"
    tokenizers==0.20.3 "huggingface_hub<1" safetensors==0.5.3 pillow==11.3.0 av==16.1.0 jinja2==3.1.6 tqdm==4.70.1
    llguidance==1.9.1
    fastapi==0.115.6 uvicorn==0.32.1 orjson==3.10.15 prometheus-client==0.21.1 httpx==0.27.2 openai==1.60.2
    pytest==8.4.2 hypothesis==6.168.5
)

# The first interpreter that starts (a version manager's shim may be found and yet not start), can make a venv, and
# is of a version that torch 2.4.1 was built for.
find_python() {
    local candidate
    for candidate in "${PYTHON_FLOOR:-python3.10}" python3.11 python3; do
        if "$candidate" -c 'import ensurepip, sys, venv; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "No Python 3.10, 3.11 or 3.12 that can make a venv; install python3.10 and python3.10-venv, or set PYTHON_FLOOR." >&2
    return 1
}

if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    "$python" -m venv --clear "$venv"
fi
pip=("$venv/bin/python" -m pip install -q --disable-pip-version-check)
"${pip[@]}" "${requirements[@]}"
"${pip[@]}" --no-deps -e . # so that nothing above is upgraded behind our back

log=$(mktemp)
trap 'rm -f "$log"' EXIT
status=0
"$venv/bin/python" -m pytest -q -m "not slow" "${tests[@]}" 2>&1 | tee "$log" || status=$?

summary=$(grep -E '^(=+ )?([0-9]+ (passed|failed|skipped|deselected|error)|no tests ran)' "$log" | tail -n 1 | sed -E 's/^=+ | =+$//g') || true
echo
echo "For docs/floor.md:"
echo
FLOOR_RESULT="${summary:-pytest gave no summary, exit status $status}" "$venv/bin/python" - <<'PY'
import os
import platform
from importlib.metadata import version

packages = (
    "torch", "transformers", "tokenizers", "huggingface_hub", "numpy", "safetensors", "pillow", "av", "fastapi", "uvicorn", "orjson",
)
rows = [("python", platform.python_version()), *((name, version(name)) for name in packages)]
rows += [("machine", platform.machine()), ("result", os.environ["FLOOR_RESULT"])]
print("| | |\n|---|---|")
print("\n".join(f"| {name} | {value} |" for name, value in rows))
PY
exit "$status"
