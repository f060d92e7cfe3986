"""A data source and a recipe of your own in one file, for the command line and every process that works on a run.

consilium run poems --import examples/own_source.py --data.poets 4
consilium resume runs/poems --import examples/own_source.py --rounds 4
"""

from dataclasses import asdict, dataclass, replace
from typing import ClassVar

from consilium.data.task import ClientData, Federation, Split, Task
from consilium.experiment import Experiment, register_data
from consilium.kinds import DataSource, Gives
from consilium.recipes import recipe
from consilium.recipes.code import affinitymoe_code

LINES = ("the rose is red", "the sea is wide", "the night is long", "the road is old")


@register_data
@dataclass(frozen=True)
class Poems(DataSource):
    """Clients with a few verses each, to predict the next token of.

    Args:
        poets: number of clients, >= 1.
        verses: verses per split.
    """

    gives: ClassVar[Gives] = "language"
    form: ClassVar[str] = "text-to-text"
    plain: ClassVar[bool] = True
    poets: int = 3
    verses: int = 40

    def load(self, seed: int) -> Federation:
        """Return the clients' data; equal seeds give equal data."""
        task = Task("next", "language", (), "token_accuracy")
        clients = {
            f"poet-{i}": ClientData(task, *(self._split(i, part) for part in ("morning", "noon", "evening")))
            for i in range(self.poets)
        }
        return Federation(clients, {}, {"type": "Poems", **asdict(self)})

    def _split(self, poet: int, time: str) -> Split:
        verses = [f"{time} {n}: {LINES[(poet + n) % len(LINES)]}" for n in range(self.verses)]
        return Split([""], ["\n".join(verses)], ["0"])


@recipe("poems")
def poems() -> Experiment:
    """AffinityMoE on poems."""
    base = affinitymoe_code()
    sampling = replace(base.sampling, clients_per_round=3)
    return replace(base, name="poems", data=Poems(), rounds=2, completions=0, sampling=sampling)
