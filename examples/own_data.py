"""Your own data: a CSV with the columns text, label and hospital becomes one model per hospital.

python examples/own_data.py FOLDER
"""

import csv
import sys
from dataclasses import replace
from pathlib import Path

import consilium

WARDS = {
    "cardiology": "chest pain and an irregular pulse after {}",
    "orthopaedics": "a swollen knee and pain when walking after {}",
    "dermatology": "an itching rash on both arms after {}",
}
CAUSES = ("a long walk", "a fall", "a cold", "new medicine", "a hot day", "a night shift", "gardening", "a journey")


def write_notes(path: Path) -> Path:
    """Three hospitals, each with 24 short notes; put your own file in its place."""
    with path.open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["text", "label", "hospital"])
        for hospital in ("north", "south", "coast"):
            for ward, note in WARDS.items():
                lines.writerows([f"{hospital}: {note.format(cause)}", ward, hospital] for cause in CAUSES)
    return path


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    recipe = consilium.recipes.find("fedmoe-text").make()
    experiment = replace(
        recipe,
        name="notes",
        rounds=3,
        data=replace(recipe.data, path=write_notes(folder / "notes.csv"), client="hospital"),
        fit=replace(recipe.fit, batch_size=8, max_length=24),
        sampling=consilium.Sampling(clients_per_round=3),
    )
    consilium.run(experiment, folder / "notes")
    run = consilium.load_run(folder / "notes")
    for hospital, result in run.summary["clients"].items():
        print(f"{hospital}: accuracy {result['test']:.2f} with {sum(result['experts'])} experts")
    print(f"next: consilium export {run.folder} --client north --out north")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "own-data"))
