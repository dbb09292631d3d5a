#!/usr/bin/env python3
"""Make small text-classification tasks from the WordNet 3.0 database files.

Four source tasks (supersense, pos, relatedness, adjective) and one low-resource
target task (hypernymy, sized like CommitmentBank's train/validation), all made
of WordNet glosses.  Standard library only; the same input files give the same
bytes on any Python 3.8+ (order comes from SHA-256, not from a random generator).

    apt-get install wordnet-base
    python make_wordnet_tasks.py --wordnet /usr/share/wordnet --out data

Every synset is used in at most one example of at most one task and split, so no
task shares a synset (or a gloss) with another, nor train with test.
"""

import argparse
import collections
import hashlib
import json
import pathlib
import re

SEED = 20210419
MIN_CHARS, MAX_CHARS = 20, 110
LEX = (
    "adj.all adj.pert adv.all noun.Tops noun.act noun.animal noun.artifact noun.attribute "
    "noun.body noun.cognition noun.communication noun.event noun.feeling noun.food noun.group "
    "noun.location noun.motive noun.object noun.person noun.phenomenon noun.plant "
    "noun.possession noun.process noun.quantity noun.relation noun.shape noun.state "
    "noun.substance noun.time verb.body verb.change verb.cognition verb.communication "
    "verb.competition verb.consumption verb.contact verb.creation verb.emotion verb.motion "
    "verb.perception verb.possession verb.social verb.stative verb.weather adj.ppl"
).split()
SOURCE_SIZES = {"train": 3000, "validation": 200, "test": 400}
TARGET_SIZES = {"train": 250, "validation": 56, "test": 1000}
LABELS = {
    "supersense": None,  # filled in: the six most frequent noun lexicographer files
    "pos": ["noun", "verb", "adjective", "adverb"],
    "relatedness": ["unrelated", "related"],
    "adjective": ["opposite", "similar"],
    "hypernymy": ["a_is_kind_of_b", "b_is_kind_of_a", "unrelated"],
}
TARGET = "hypernymy"


def order(salt):
    """A sort key that shuffles: SHA-256 of the seed, a salt and the item."""
    return lambda item: hashlib.sha256(f"{SEED}|{salt}|{item!r}".encode()).digest()


def read_wordnet(folder):
    """{(pos, offset): (lexicographer file, is satellite, gloss, [(symbol, (pos, offset))])}"""
    synsets = {}
    for part in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"data.{part}").read_text(encoding="ascii").splitlines():
            if line.startswith("  "):  # the licence at the top
                continue
            head, gloss = line.split("|", 1)
            f = head.split()
            at = 4 + 2 * int(f[3], 16)
            ptrs = [
                (f[at + 1 + 4 * k], (f[at + 3 + 4 * k], f[at + 2 + 4 * k]))
                for k in range(int(f[at]))
            ]
            synsets[(f[2].replace("s", "a"), f[0])] = (int(f[1]), f[2] == "s", gloss.strip(), ptrs)
    return synsets


def definition(gloss):
    """The gloss without its example sentences; None where a quotation remains."""
    text = re.split(r';\s*(?=")', gloss)[0].strip(" ;")
    return None if '"' in text else text


class Maker:
    def __init__(self, synsets):
        self.synsets = synsets
        text = {k: definition(v[2]) for k, v in synsets.items()}
        seen = collections.Counter(t.lower() for t in text.values() if t)
        self.text = {
            k: t
            for k, t in text.items()
            if t
            and seen[t.lower()] == 1
            and MIN_CHARS <= len(t) <= MAX_CHARS
            and len(t.split()) >= 3
        }
        self.used = set()
        self._up = {}

    def lex(self, k):
        return self.synsets[k][0]

    def free(self, k):
        return k in self.text and k not in self.used

    def ancestors(self, k):
        if k not in self._up:
            up = set()
            for symbol, other in self.synsets[k][3]:
                if symbol in ("@", "@i"):
                    up.add(other)
                    up |= self.ancestors(other)
            self._up[k] = up
        return self._up[k]

    # -- noun hypernym pairs -------------------------------------------------
    def hypernym_blocks(self, salt, size):
        """Disjoint blocks of `size` (child, parent) pairs, each within one lexicographer file."""
        children = collections.defaultdict(list)
        for k in self.text:
            if k[0] == "n" and self.free(k):
                for symbol, other in self.synsets[k][3]:
                    if symbol == "@" and self.free(other) and self.lex(other) == self.lex(k):
                        children[other].append(k)
        taken, by_lex = set(), collections.defaultdict(list)
        for parent in sorted(children, key=order(salt + "/parent")):
            if parent in taken:
                continue
            for child in sorted(children[parent], key=order(salt + "/child")):
                if child not in taken:
                    taken |= {child, parent}
                    by_lex[self.lex(parent)].append((child, parent))
                    break
        blocks = []
        for pairs in by_lex.values():
            blocks += [pairs[i : i + size] for i in range(0, len(pairs) - size + 1, size)]
        return sorted(blocks, key=order(salt + "/block"))

    def repair(self, pairs):
        """[(c1, p1), (c2, p2)] -> [(c1, p2), (c2, p1)], or None if one is the other's ancestor."""
        (c1, p1), (c2, p2) = pairs
        new = [(c1, p2), (c2, p1)]
        for a, b in new:
            if a in self.ancestors(b) or b in self.ancestors(a):
                return None
        return new

    def pair_task(self, salt, sizes, block, build, labels):
        blocks = iter(self.hypernym_blocks(salt, block))
        out = {}
        for split in ("test", "validation", "train"):
            n, per_label = sizes[split], collections.defaultdict(list)
            quota = [n // labels + (i < n % labels) for i in range(labels)]
            while any(len(per_label[i]) < quota[i] for i in range(labels)):
                for a, b, label in build(next(blocks)) or ():
                    if len(per_label[label]) < quota[label]:
                        per_label[label].append((a, b))
                        self.used |= {a, b}
            out[split] = [(p, i) for i in range(labels) for p in per_label[i]]
        return out

    def hypernymy(self):
        def build(block):
            swapped = self.repair(block[4:])
            if swapped is None:
                return None
            (a, b), (c, d) = swapped
            return (
                [(x, y, 0) for x, y in block[:2]]
                + [(y, x, 1) for x, y in block[2:4]]
                + [(a, b, 2), (d, c, 2)]
            )  # one unrelated pair in either order

        return self.pair_task("hypernymy", TARGET_SIZES, 6, build, 3)

    def relatedness(self):
        def build(block):
            swapped = self.repair(block[2:])
            if swapped is None:
                return None
            (a, b), (c, d) = swapped
            return [(*block[0], 1), (*block[1][::-1], 1), (a, b, 0), (d, c, 0)]

        return self.pair_task("relatedness", SOURCE_SIZES, 4, build, 2)

    # -- adjectives ------------------------------------------------------------
    def adjective(self, most=4):
        """Members of one adjective cluster (similar) or of two antonymous clusters (opposite)."""
        cluster, twos = {}, set()
        for k, (_, satellite, _, ptrs) in self.synsets.items():
            if k[0] == "a" and not satellite:
                cluster[k] = [k] + [o for s, o in ptrs if s == "&"]
                twos |= {tuple(sorted((k, o))) for s, o in ptrs if s == "!"}
        twos = iter(sorted(twos, key=order("adjective/two")))
        seen, out = set(), {}
        for split in ("test", "validation", "train"):
            n = SOURCE_SIZES[split] // 2
            opposite, similar = [], []
            while len(opposite) < n or len(similar) < n:
                heads = next(twos)
                if seen & set(heads):
                    continue
                seen |= set(heads)
                left, right = (
                    [m for m in sorted(cluster[h], key=order("adjective/member")) if self.free(m)]
                    for h in heads
                )
                for turn in range(most):
                    pools = sorted((left, right), key=len)
                    if turn % 2 == 0 and left and right and len(opposite) < n:
                        pair = (left.pop(), right.pop())
                        opposite.append(pair if turn % 4 else pair[::-1])
                    elif turn % 2 == 1 and len(pools[1]) > 1 and len(similar) < n:
                        pair = (pools[1].pop(), pools[1].pop())
                        similar.append(pair)
                    else:
                        continue
                    self.used |= set(pair)
                    left[:] = [m for m in left if self.free(m)]
                    right[:] = [m for m in right if self.free(m)]
            out[split] = [(p, 0) for p in opposite] + [(p, 1) for p in similar]
        return out

    # -- single glosses ----------------------------------------------------------
    def single(self, salt, groups):
        out = collections.defaultdict(list)
        for label, keys in enumerate(groups):
            keys = iter(sorted((k for k in keys if self.free(k)), key=order(salt)))
            for split in ("test", "validation", "train"):
                n = SOURCE_SIZES[split]
                for _ in range(n // len(groups) + (label < n % len(groups))):
                    k = next(keys)
                    self.used.add(k)
                    out[split].append(((k,), label))
        return out

    def supersense(self):
        count = collections.Counter(self.lex(k) for k in self.text if k[0] == "n")
        top = sorted(lex for lex, _ in count.most_common(6))
        LABELS["supersense"] = [LEX[i] for i in top]
        return self.single(
            "supersense", [[k for k in self.text if k[0] == "n" and self.lex(k) == i] for i in top]
        )

    def pos(self):
        return self.single("pos", [[k for k in self.text if k[0] == p] for p in "nvar"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--wordnet", type=pathlib.Path, default="/usr/share/wordnet")
    parser.add_argument("--out", type=pathlib.Path, default="data")
    parser.add_argument("--ids", action="store_true", help="also write each example's synsets")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    maker = Maker(read_wordnet(args.wordnet))
    tasks = {
        name: getattr(maker, name)()
        for name in (TARGET, "relatedness", "adjective", "supersense", "pos")
    }

    where, texts = {}, {}
    for name, splits in tasks.items():
        for split, rows in splits.items():
            sizes = TARGET_SIZES if name == TARGET else SOURCE_SIZES
            assert len(rows) == sizes[split], (name, split, len(rows))
            path = args.out / f"{name}.{split}.jsonl"
            with open(path, "w", encoding="ascii", newline="\n") as f:
                for keys, label in sorted(rows, key=order(f"{name}/{split}/row")):
                    for k in keys:  # each synset once in the whole collection
                        assert where.setdefault(k, (name, split, keys)) == (name, split, keys), k
                        assert texts.setdefault(maker.text[k].lower(), k) == k, k
                    assert len(set(keys)) == len(keys)
                    fields = ("text",) if len(keys) == 1 else ("text_a", "text_b")
                    row = dict(zip(fields, (maker.text[k] for k in keys), strict=True), label=label)
                    if args.ids:
                        row["synsets"] = ["".join(k) for k in keys]
                    f.write(json.dumps(row) + "\n")
            counts = collections.Counter(label for _, label in rows)
            print(
                f"{path.name:32s} {len(rows):5d} {path.stat().st_size:8d} bytes  "
                f"{[counts[i] for i in range(len(LABELS[name]))]}"
            )
    (args.out / "labels.json").write_text(json.dumps(LABELS, indent=1) + "\n")
    print("synsets used:", len(where))


if __name__ == "__main__":
    main()
