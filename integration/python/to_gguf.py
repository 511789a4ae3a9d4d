#!/usr/bin/env python3
"""Convert a checkpoint of make_models.py for llama.cpp, whose converter knows tokenizers by their hashes and so refuses these models' own.

    pip download --no-binary llama-cpp-python --no-deps llama-cpp-python && tar xf llama_cpp_python-*.tar.gz
    pip install torch transformers safetensors
    python to_gguf.py llama_cpp_python-*/vendor/llama.cpp MODEL_DIR --outtype bf16 --outfile MODEL.gguf

The vocabulary is written as a GPT-2 one, which it is; everything else is done by the converter.
"""

import pathlib
import runpy
import sys


def main():
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    converter = pathlib.Path(sys.argv.pop(1))
    sys.path[:0] = [str(converter), str(converter / "gguf-py")]
    from conversion.base import TextModel
    from conversion.llama import LlamaModel

    TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    LlamaModel.set_vocab = lambda self: self._set_vocab_gpt2()
    runpy.run_path(str(converter / "convert_hf_to_gguf.py"), run_name="__main__")


if __name__ == "__main__":
    main()
