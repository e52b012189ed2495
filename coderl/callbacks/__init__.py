"""Lightning callbacks: what happens beside training. Each stands in a config: to be seen, and dropped."""

from coderl.callbacks.checkpoint import BestCheckpoint, Checkpoint
from coderl.callbacks.completions import CompletionTable
from coderl.callbacks.interrupt import SaveOnInterrupt
from coderl.callbacks.merging import MergedCheckpoints
from coderl.callbacks.postfit import PostFit
from coderl.callbacks.stopping import RewardStopping

__all__ = [
    "BestCheckpoint",
    "Checkpoint",
    "CompletionTable",
    "MergedCheckpoints",
    "PostFit",
    "RewardStopping",
    "SaveOnInterrupt",
]
