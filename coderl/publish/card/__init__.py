"""Model cards: what a model is, how it was trained, what was measured of it, and how to use it.

Whatever is told stands in the model's own folder or in its run's; what is not known is left out.
"""

from coderl.publish.card.facts import MERGED, is_hub_id, name_of, note, run_of
from coderl.publish.card.write import FILE, call, write

__all__ = ["FILE", "MERGED", "call", "is_hub_id", "name_of", "note", "run_of", "write"]
