"""Lightning callbacks, one file each: what happens beside training, and stands in a config to be dropped.

Here belongs what saves, measures, logs or ends a fit at Lightning's hooks; what changes a gradient belongs in
:mod:`coderl.algorithms`. Callbacks read the module and its rollout, and write to the run folder and the
loggers.
"""

from coderl.callbacks.best_checkpoint import BestCheckpoint
from coderl.callbacks.checkpoint import Checkpoint
from coderl.callbacks.completions import CompletionTable
from coderl.callbacks.health import Health
from coderl.callbacks.interrupt import SaveOnInterrupt
from coderl.callbacks.merging import MergedCheckpoints
from coderl.callbacks.postfit import PostFit
from coderl.callbacks.stopping import RewardStopping

__all__ = [
    "BestCheckpoint",
    "Checkpoint",
    "CompletionTable",
    "Health",
    "MergedCheckpoints",
    "PostFit",
    "RewardStopping",
    "SaveOnInterrupt",
]
