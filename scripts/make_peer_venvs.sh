#!/usr/bin/env bash
# make_peer_venvs.sh FOLDER [PYTHON]: what benchmarks/vllm_pd.py measures kvferry against, each with the same vLLM for a
# CPU in an environment of its own: FOLDER/nixl and FOLDER/lmcache (which needs other versions of numpy and protobuf).
# Takes about five minutes and 5.5 GB; can be run again.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:?usage: make_peer_venvs.sh FOLDER [PYTHON]}
python=${2:-python3.11}

for peer in nixl lmcache; do
    scripts/make_venv_vllm.sh "$folder/$peer" "$python"
done
# Without dependencies: those of `nixl` are torch and numpy, which are there.
"$folder/nixl/bin/pip" --disable-pip-version-check --quiet install --no-deps nixl==1.5.1 nixl-cu12==1.5.1
"$folder/nixl/bin/python" -c "import nixl._api"
# The list holds all that the wheel asks for in place of, or beside, what vLLM has.
"$folder/lmcache/bin/pip" --disable-pip-version-check --quiet install --no-deps --requirement scripts/lmcache_requirements.txt
"$folder/lmcache/bin/python" -c "import lmcache.integration.vllm.lmcache_mp_connector"
