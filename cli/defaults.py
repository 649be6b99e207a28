"""What is served when nothing else is named."""

from pathlib import Path

DEMO_MODEL = Path(__file__).resolve().parent.parent / "demo_model" / "main"
"""The model that Baton ships."""
DEMO_NAME = "baton-demo"


def name_of(model_dir: Path) -> str:
    """Return the name under which a checkpoint folder is served: the folder's."""
    return DEMO_NAME if model_dir.resolve() == DEMO_MODEL else model_dir.resolve().name
