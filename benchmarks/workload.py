"""What agents say and see, made up: prose, agent runs, requests and replies of any size, the same for a seed.

The words are no language's, but lengths, frequencies (Zipf's law), phrases, punctuation, names, figures,
links, code and other scripts are as in text that agents pass around, so it compresses like it: by 2.5 to 3
with zstd at level 1 from 100 KB on. An agent's run repeats itself, so it compresses by 5 to 8 until it
outgrows the compressor's window (2.7 at 10 MB).
"""

import random
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import accumulate
from typing import Any, Final

import orjson

__all__ = ["Step", "agent_run", "request_body", "response_body", "text"]

SLOTS: Final = 1 << 16
"""Entries of the table that words are drawn from: one draw is two random bytes."""
EXPONENT: Final = 1.08
SHIFT: Final = 2.7
"""Frequency of the word of rank r is 1 / (r + SHIFT) ** EXPONENT, Mandelbrot's form of Zipf's law."""
WORDS: Final = 12_000
PHRASES: Final = 4_000
"""Words that often follow each other ("as soon as"): text without any compresses worse than language."""

ONSETS: Final = "b c ch d f g h j k l m n p qu r s sh st t th tr v w y pl gr br cl - - - - - -"
VOWELS: Final = "a e i o u a e i o ea ou io ai ee"
CODAS: Final = "n r s t l d m ng nt st ck x - - - - - - - - - -"
"""Parts of a syllable, as often as they shall occur; a dash is none."""
ACCENTED: Final = "café naïve Zürich São señor déjà façade Übung jalapeño Łódź Ångström crème"
TYPOGRAPHY: Final = "— … € “ ” „ « »"
OTHER_SCRIPTS: Final = "東京 退款政策 订单号 こんにちは 고객 지원 Привет возврат مرحبا धन्यवाद"
EMOJI: Final = "🙂 🎉 👍 🚀 ✅ 🤖"
MODEL: Final = "gpt-large"
CODE: Final = (
    "`SELECT id, total FROM orders WHERE status = 'open' LIMIT 20;`",
    "```python\nfor item in cart.items():\n    total += item.price * item.count\n```",
    '`{"id": 4711, "tags": ["a", "b"], "open": true}`',
    "`git log --oneline -n 5`",
    "`assert response.status_code == 200`",
)

FRAME_BYTES: Final = 3_500
REPEATS: Final = 3.1
TURNS: Final = 24
DOCUMENTS: Final = 20
HITS: Final = 25
"""Most messages of a history, documents of a retrieval, and rows of a tool's reply: what grows beyond is the
text in each, as with agents that page, keep the best k, and read whole files."""


@dataclass(frozen=True)
class Step:
    """One call within an agent's run; inputs and outputs are what JSON can hold."""

    name: str
    span_type: str
    inputs: Any
    outputs: Any


def text(nbytes: int, seed: int) -> str:
    """Prose whose UTF-8 has ``nbytes`` bytes, up to three less where a character would be cut."""
    table, mean = token_table()
    # Lengths of tokens average out: a hundredth and two hundred more than expected are always enough.
    count = int(1.01 * nbytes / mean) + 200
    # By both: with the seed alone a short text would be the beginning of a long one.
    slots = array("H", random.Random(f"{seed} {nbytes}").randbytes(2 * count))
    return b" ".join(map(table.__getitem__, slots))[:nbytes].decode(errors="ignore")


@lru_cache(maxsize=16)
def agent_run(nbytes: int, seed: int) -> list[Step]:
    """The eight calls of a support agent's run, in the order in which they start; the first is the root.

    A history of messages, to which each call adds: later inputs repeat the earlier ones, as the same objects.
    Inputs and outputs as JSON have ``nbytes`` bytes together, within a tenth from 4 KB to 16 MB.
    """
    run = support_run(nbytes, nbytes, seed)
    return support_run(nbytes, 2 * nbytes - json_bytes(run), seed)


def json_bytes(run: list[Step]) -> int:
    return sum(len(orjson.dumps(step.inputs)) + len(orjson.dumps(step.outputs)) for step in run)


class Prose:
    """Text to be taken from in pieces."""

    def __init__(self, nbytes: int, seed: int) -> None:
        self.text = text(nbytes, seed)
        self.taken = 0

    def take(self, share: float) -> str:
        """The next piece, of ``share`` of all the text."""
        start, self.taken = self.taken, self.taken + int(share * len(self.text))
        return self.text[start : self.taken]


def support_run(nbytes: int, payload: int, seed: int) -> list[Step]:
    """A run with the counts of one of ``nbytes``, and about ``payload`` bytes."""
    # History is in four inputs, documents in a retrieval, its rating and three calls, the tools' replies in
    # two and three places: REPEATS is how often a byte of the prose is there on average.
    prose = Prose(int(max(0, payload - FRAME_BYTES) / REPEATS), seed)
    draw = random.Random(seed)
    system = {"role": "system", "content": prose.take(0.05)}
    pairs = between(1, nbytes // 40_000, TURNS // 2)
    history = [{"role": role, "content": prose.take(0.125 / pairs)} for role in ("user", "assistant") * pairs]
    question = {"role": "user", "content": prose.take(0.02)}
    documents = found_documents(prose, draw, between(2, nbytes // 10_000, DOCUMENTS))
    best = documents[: len(documents) // 2]
    context = {"role": "system", "content": "\n\n".join(document["page_content"] for document in best)}
    asked = [system, *history, question]
    orders = {"customer_id": draw.randrange(10**9), "status": "open"}
    rows = tool_rows(prose, draw, between(1, nbytes // 10_000, HITS))
    page = {"url": f"https://docs.example/{draw.randrange(10**6)}", "section": 2}
    article = {"title": prose.take(0.001), "text": prose.take(0.16)}
    first = [*asked, context]
    second = [*first, tool_call("orders", orders, draw), tool_reply(rows)]
    third = [*second, tool_call("read_page", page, draw), tool_reply(article)]
    answer = {"role": "assistant", "content": prose.take(0.06) + " 🙂"}
    return [
        Step("support_agent", "AGENT", {"messages": asked}, {"messages": [answer], "finish": "stop"}),
        Step("search", "RETRIEVER", {"query": question["content"], "k": len(documents)}, documents),
        Step("rank", "RERANKER", {"query": question["content"], "documents": documents}, best),
        Step("chat", "CHAT_MODEL", {"model": MODEL, "messages": first}, completion(second[-2], draw)),
        Step("orders", "TOOL", orders, rows),
        Step("chat", "CHAT_MODEL", {"model": MODEL, "messages": second}, completion(third[-2], draw)),
        Step("read_page", "TOOL", page, article),
        Step("chat", "CHAT_MODEL", {"model": MODEL, "messages": third}, completion(answer, draw)),
    ]


def between(least: int, value: int, most: int) -> int:
    return max(least, min(value, most))


def found_documents(prose: Prose, draw: random.Random, count: int) -> list[dict[str, Any]]:
    return [
        {
            "id": f"{draw.getrandbits(32):08x}",
            "page_content": prose.take(0.3 / count),
            "metadata": {"score": draw.random(), "page": draw.randrange(100)},
        }
        for _ in range(count)
    ]


def tool_rows(prose: Prose, draw: random.Random, count: int) -> list[dict[str, Any]]:
    return [
        {
            "order_id": draw.randrange(10**9),
            "total": draw.randrange(10**5) / 100,
            "open": draw.random() < 0.5,
            "receipt": None,
            "note": prose.take(0.15 / count),
        }
        for _ in range(count)
    ]


def tool_call(name: str, arguments: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    function = {"name": name, "arguments": orjson.dumps(arguments).decode()}
    call = {"id": f"call_{draw.getrandbits(32):08x}", "type": "function", "function": function}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


def tool_reply(value: Any) -> dict[str, Any]:
    return {"role": "tool", "content": orjson.dumps(value).decode()}


def completion(message: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """A chat completion around its one message."""
    tokens = draw.randrange(1000), draw.randrange(1000)
    return {
        "id": f"chatcmpl-{draw.getrandbits(32):08x}",
        "object": "chat.completion",
        "model": MODEL,
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": tokens[0], "completion_tokens": tokens[1], "total_tokens": sum(tokens)},
    }


@lru_cache(maxsize=16)
def request_body(nbytes: int, seed: int) -> bytes:
    """A chat-completion request as JSON, of about ``nbytes`` bytes and not below 200."""
    return filled(nbytes, seed, lambda said: {"model": MODEL, "messages": conversation(said)})


@lru_cache(maxsize=16)
def response_body(nbytes: int, seed: int) -> bytes:
    """A chat completion as JSON, of about ``nbytes`` bytes and not below 400."""

    def made(said: str) -> dict[str, Any]:
        return completion({"role": "assistant", "content": said}, random.Random(seed))

    return filled(nbytes, seed, made)


def conversation(said: str) -> list[dict[str, str]]:
    cut = len(said) // 2
    return [{"role": "system", "content": said[:cut]}, {"role": "user", "content": said[cut:]}]


def filled(nbytes: int, seed: int, make: Callable[[str], dict[str, Any]]) -> bytes:
    """JSON with as much prose in it as makes it ``nbytes`` long, but for what quotes and newlines add."""
    said = text(nbytes, seed)
    excess = len(orjson.dumps(make(said))) - nbytes
    return orjson.dumps(make(said[: max(0, len(said) - excess)]))


@cache
def token_table() -> tuple[list[bytes], float]:
    """What a text is drawn from, each as often as it shall occur, and the mean of its bytes with a space."""
    draw = random.Random(2026)
    words = vocabulary(draw)
    of_words = list(accumulate(zipf(WORDS)))
    of_phrases = list(accumulate(zipf(PHRASES)))

    def word() -> str:
        return draw.choices(words, cum_weights=of_words)[0]

    phrases = [" ".join(word() for _ in range(draw.randint(2, 5))) for _ in range(PHRASES)]
    starts = [word().capitalize() for _ in range(60)]

    def phrase() -> str:
        return draw.choices(phrases, cum_weights=of_phrases)[0]

    kinds: dict[Callable[[], str], float] = {
        phrase: 0.2,
        lambda: f"{word()},": 0.06,
        lambda: f"{word()}. {draw.choice(starts)}": 0.05,
        lambda: f"{word()}.\n\n{draw.choice(starts)}": 0.006,
        lambda: f"{word()}:\n- {phrase()}\n- {phrase()}": 0.002,
        lambda: f"{draw.choice(words).capitalize()} {draw.choice(words).capitalize()}": 0.01,
        lambda: figure(draw): 0.02,
        lambda: f"https://{word()}.example/{word()}/{draw.randrange(10**6)}?q={word()}": 0.001,
        lambda: draw.choice(CODE): 0.001,
        lambda: draw.choice(ACCENTED.split()): 0.004,
        lambda: draw.choice(TYPOGRAPHY.split()): 0.003,
        lambda: draw.choice(OTHER_SCRIPTS.split()): 0.001,
        # One in 300 KB: Python keeps a whole text at four bytes a character for one such.
        lambda: draw.choice(EMOJI.split()): 0.00004,
    }
    table = [make() for make, share in kinds.items() for _ in range(int(share * SLOTS))]
    table += draw.choices(words, cum_weights=of_words, k=SLOTS - len(table))
    tokens = [token.encode() for token in table]
    return tokens, sum(map(len, tokens)) / SLOTS + 1


def zipf(count: int) -> list[float]:
    return [1 / (rank + SHIFT) ** EXPONENT for rank in range(1, count + 1)]


def vocabulary(draw: random.Random) -> list[str]:
    """Distinct words; the frequent ones are short."""
    found: dict[str, None] = {}
    while len(found) < WORDS:
        longest = 1 + (len(found) > 60) + (len(found) > 1500) + (len(found) > 6000)
        syllables = draw.randint(max(1, longest - 1), longest)
        found["".join(syllable(draw) for _ in range(syllables))] = None
    return list(found)


def syllable(draw: random.Random) -> str:
    return "".join(draw.choice(parts.split()) for parts in (ONSETS, VOWELS, CODAS)).replace("-", "")


def figure(draw: random.Random) -> str:
    """A number, an amount, a date or an order's number."""
    number = draw.randrange(10 ** draw.randint(1, 6))
    return draw.choice(
        (
            str(number),
            f"{number / 100:.2f} €",
            f"{number % 100} %",
            f"2026-{number % 12 + 1:02}-{number % 28 + 1:02}",
            f"#{number:06}",
        )
    )
