import sys
from pathlib import Path

# ComfyUI, which comes first on the path by now, has a module `server` too.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
