"""Visual prompt tuning (Jia et al., "Visual Prompt Tuning", arXiv 2203.12119)."""

from .config import VisualPromptConfig
from .layer import VisualPromptLayer
from .model import VisualPromptModel

__all__ = ["VisualPromptConfig", "VisualPromptLayer", "VisualPromptModel"]
