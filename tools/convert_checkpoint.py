"""Weights from and to Hugging Face; the same as `maxlm convert`.

python tools/convert_checkpoint.py from-hf FOLDER OUT [--dtype=bfloat16] [--pad_vocab=128]
python tools/convert_checkpoint.py to-hf CHECKPOINT_OR_WORKDIR OUT [--dtype=bfloat16] [--family=llama]
"""

from __future__ import annotations

import sys

from maxlm.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
