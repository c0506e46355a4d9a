"""The parts of MinLlama that the course script never had: a folder to a floor.

A module imports only from its own folder and from those listed above it:

    system      errors, files written whole or not at all, locks, signals, sizes
    cli         flags, messages, progress bars
    machine     device, GPUs, random state, several processes
    vocabulary  token ids and their text: SentencePiece and byte-level BPE
    text        text, dialogues and labelled sentences to token ids
    model       the Llama's shape, and what makes it fast, smaller or trainable in part
    formats     model files: each format read, written and checked
    inference   prompts, streams, conversations, scores
    runs        a run on the disk: its folder, checkpoints, metrics, report, plan
    training    the tasks, the loop, and keeping to --minutes

The seven modules at the top of the repository are the user's. `llama`, `optimizer`, `utils` and
`tokenizer` are built on these folders and used by them; the commands are above them all.
"""

import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # of the repository, where its commands are
COMMANDS = ("run_llama.py", "check_model_precision.py", "tokenizer.py")
NEEDED = ("torch", "numpy", "sentencepiece", "tqdm")

# Most often the virtual environment is not active in a new terminal. A command says so in place of
# a traceback; who imports these modules gets Python's own error.
lacking = [name for name in NEEDED if importlib.util.find_spec(name) is None]
if lacking and Path(sys.argv[0]).name in COMMANDS:
    print(
        f"{Path(sys.argv[0]).name}: error: this Python, {sys.executable}, has no "
        f"{', '.join(lacking)}: activate the virtual environment that they are in (of the README: "
        "`. .venv/bin/activate`, on Windows `.venv\\Scripts\\activate`), or install them: "
        f"{sys.executable} -m pip install -r {ROOT / 'requirements.txt'}",
        file=sys.stderr,
    )
    sys.exit(2)

# Threads that wait for others soon sleep: beside other work a spinning one holds the core that the
# others need, and one that sleeps at once wakes too late where there is none. GNU's OpenMP counts
# its turns. It reads these when torch is first imported, which is later.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
