"""Writes mixed_lengths.txt: 200 texts of the lengths of long-caption data, half short, half long, in a fixed order.

The short ones (8 to 32 tokens) are single sentences: everyday captions, written for this list and listed below, and
sentences of the example captions. The long ones (120 to 248 tokens, every length equally likely) join sentences of
different captions, so that no two of them are alike. Run it again after the captions changed:

    python benchmarks/make_mixed_lengths.py
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

from open_clip.tokenizer import SimpleTokenizer

from longclip_rt.bundle.samples import example_captions

TARGET = Path(__file__).with_name("mixed_lengths.txt")
SEED = 248
EACH = 100
SHORT = (8, 32)
LONG = (120, 248)

EVERYDAY = """
Two children in rubber boots jump into a puddle after the rain.
An old fishing boat lies on its side on the beach at low tide.
A woman reads a newspaper at a table outside a corner café.
Freshly baked loaves of bread cool on a rack by the window.
A black dog shakes the water from its coat on a wooden jetty.
Commuters wait under umbrellas for the tram on a grey morning.
A market stall is piled high with lemons, artichokes and tomatoes.
Snow covers the roofs of a small village at the foot of the mountains.
A cyclist in a yellow jersey climbs a steep road between rocks.
Three hot-air balloons drift over a valley filled with mist.
A boy asleep on his father's shoulder in a crowded underground train.
Steam rises from a bowl of noodles with spring onions and a halved egg.
The empty swings of a playground move in the wind at dusk.
A red kite hangs almost motionless above the dunes.
Laundry dries on lines strung across a narrow street in the old town.
A goalkeeper stretches for the ball, one hand just short of it.
Dozens of colourful pencils stand in a glass jar on a desk.
A tractor leaves a cloud of dust behind as it crosses the field.
Reflections of neon signs run down the wet pavement at night.
A grandmother and a girl shell peas at a kitchen table.
A lighthouse with red and white stripes on a rocky headland.
An upright piano with a few missing keys stands in an empty hall.
Four friends play cards on a blanket under a chestnut tree.
A ginger cat squeezes through a gap in a garden fence.
The mechanic lies under a blue van with only his boots showing.
Rows of green tea bushes follow the curves of the hillside.
A violinist tunes her instrument behind the curtain before the concert.
Someone has drawn a smiling face on the dusty window of a lorry.
A flock of starlings forms a dark cloud over the harbour at sunset.
A plate with a half-eaten slice of cherry cake and a silver fork.
Two elderly men play chess in the park while a third looks on.
A climber rests on a ledge, her rope running up out of sight.
The old stone bridge and its arches are mirrored in the calm river.
A barber sweeps the floor of his shop at the end of the day.
Sheep block a country lane, and a driver waits with the engine off.
A toddler in a striped jumper builds a tower of wooden blocks.
Brown envelopes, stamps and a fountain pen on a green leather desk pad.
A waiter balances three plates on one arm in a busy restaurant.
The first crocuses push through the last patches of snow on the lawn.
A street musician with an accordion and a hat full of coins.
A freight train of many rusty wagons winds through a pine forest.
Sunlight falls through tall windows onto the floor of a library.
A nurse in blue scrubs pours tea from a flask during a night shift.
Paper lanterns float down the river between the dark banks.
A girl with paint on her fingers holds up a picture of a whale.
Wooden crates of apples stand in the back of an open pick-up truck.
A diver follows a turtle over a reef in clear blue water.
The hands of a potter shape a bowl on the turning wheel.
An empty plastic chair stands in the middle of a flooded field.
Passengers lean on the rail of a white ferry and watch the gulls.
"""


def main() -> None:
    """Writes the list and prints how long its texts are."""
    vocabulary = SimpleTokenizer(context_length=LONG[1])

    def length(text: str) -> int:
        return len(vocabulary.encode(text)) + 2  # with SOT and EOT

    captions = example_captions()
    everyday = EVERYDAY.strip().splitlines()
    described = [[sentence.strip(" .") + "." for sentence in caption.long.split(". ")] for caption in captions]
    short = everyday + [caption.short for caption in captions] + [sentence for text in described for sentence in text]
    short = [text for text in dict.fromkeys(short) if SHORT[0] <= length(text) <= SHORT[1]][:EACH]

    chance = random.Random(SEED)
    pool = [*described, *([sentence] for sentence in everyday)]
    long: list[str] = []
    while len(long) < EACH:
        wanted = chance.randint(*LONG)
        text = _joined(pool, wanted, length, chance)
        if LONG[0] <= length(text) <= LONG[1] and text not in long:
            long.append(text)
    texts = short + long
    chance.shuffle(texts)
    TARGET.write_text("\n".join(texts) + "\n", encoding="utf-8")
    lengths = sorted(length(text) for text in texts)
    print(f"{TARGET.name}: {len(texts)} texts of {lengths[0]} to {lengths[-1]} tokens, {sum(lengths)} in all")


def _joined(pool: Sequence[Sequence[str]], wanted: int, length: Callable[[str], int], chance: random.Random) -> str:
    """Sentences of different captions, drawn without repetition, until the next one would exceed `wanted` tokens."""
    chosen: list[str] = []
    for source in chance.sample(pool, len(pool)):
        sentence = chance.choice(source)
        if length(" ".join([*chosen, sentence])) > wanted:
            break
        chosen.append(sentence)
    return " ".join(chosen)


if __name__ == "__main__":
    main()
