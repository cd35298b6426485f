"""A tiny random model with a tokenizer, and a real server of it on a thread of this process."""

import asyncio
import itertools
import json
import string
import threading
from pathlib import Path
from typing import Any

import httpx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from jaxinfer.async_llm import AsyncLLM
from jaxinfer.config import EngineConfig
from jaxinfer.server import Server, bind
from jaxinfer.server_config import ServerConfig

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
NAME = "tiny"
SMALL = {"max_num_seqs": 8, "max_model_len": 256, "block_size": 16, "max_num_batched_tokens": 128, "use_tqdm": False}


def tokenizer_directory(folder: Path) -> Path:
    """A byte-level BPE of tiny-llama's 512 ids: three special tokens, the bytes, and pairs of letters."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = list(itertools.islice(itertools.product(string.ascii_lowercase, repeat=2), 512 - 3 - 256))
    tokens = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, pairs)]
    bpe = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=pairs))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(["<unk>", "<s>", "</s>"])
    bpe.save(str(folder / "tokenizer.json"))
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return folder


def engine_config(tokenizer: Path | None, model: str = "random:tiny-llama", **settings: Any) -> EngineConfig:
    path = None if tokenizer is None else str(tokenizer)
    return EngineConfig(model=model, tokenizer=path).override(**{**SMALL, **settings})


class Running:
    """A server on a thread of its own; `with` starts and stops it."""

    def __init__(self, config: EngineConfig, llm: AsyncLLM | None = None, **options: Any):
        options = {"port": 0, "warmup": False, "served_model_name": [NAME], "shutdown_timeout": 20.0, **options}
        self.server = Server(config, ServerConfig(**options), llm)
        self.status: int | None = None
        self._thread = threading.Thread(target=self._run)
        self._socket = bind("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"

    def _run(self) -> None:
        async def main() -> None:
            self.loop = asyncio.get_running_loop()
            self.status = await self.server.run(self._socket)

        asyncio.run(main())

    def __enter__(self) -> "Running":
        self._thread.start()
        with httpx.Client(base_url=self.url) as client:
            while client.get("/ready").status_code != 200:
                threading.Event().wait(0.02)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self.server.stop)
        self.join()

    def join(self) -> int | None:
        self._thread.join(60)
        assert not self._thread.is_alive()
        return self.status

    @property
    def engine(self) -> Any:
        assert self.server.llm is not None
        return self.server.llm.engine

    def all_free(self, seconds: float = 5.0) -> bool:
        """Whether every page is, or becomes within so many seconds, free, with nothing left running."""
        for _ in range(int(seconds / 0.02)):
            pool = self.engine.scheduler.pool
            if not self.engine.has_unfinished and pool.num_free == pool.num_pages - 1 and not self.server.door.calls:
                return True
            threading.Event().wait(0.02)
        return False
