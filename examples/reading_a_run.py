"""Reading a run with pandas: who gained what, what it cost, and who holds which experts.

python examples/reading_a_run.py runs/fedmoe-docstrings
"""

import sys
from collections import Counter

import consilium


def main(folder: str) -> None:
    run = consilium.load_run(folder)
    print(f"{run.summary['algorithm']}, {run.config['rounds']} rounds, {run.status}; report: {run.report}")

    rounds = run.rounds()  # a DataFrame, one row a round
    scored = rounds.dropna(subset="mean")
    print(f"mean score: {scored['mean'].iloc[0]:.3f} at first, {scored['mean'].max():.3f} at best")
    rounds["megabytes"] = (rounds["bytes_down"] + rounds["bytes_up"]).cumsum() / 1e6
    print(rounds.loc[scored.index, ["mean", "megabytes", "seconds_round"]].round(3).to_string())

    clients = run.clients()  # one row for each round and client
    by_client = clients.groupby("client").agg(
        last_test=("test", "last"), loss=("train_loss", "last"), trained=("train_loss", "count"), up=("bytes_up", "sum")
    )
    print(by_client.round(3).to_string())

    holders = Counter(
        (block, expert) for blocks in run.experts.values() for block, ids in blocks.items() for expert in ids
    )
    for (block, expert), held in holders.most_common(3):
        print(f"expert {expert} of {block} is held by {held} of {len(run.experts)} clients")


if __name__ == "__main__":
    main(sys.argv[1])
