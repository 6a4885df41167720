"""Trains the demo model: `python models/demo/train.py --out models/demo/weights`.

The text is drawn while training, so no example is seen twice except where the task has few. Conversations of like
length share a batch and each begins at position 0, exactly as the server runs them: no packing, no masks. Two
processes with one thread each, not one with two: they meet once per step instead of once per operation, which keeps
the pace when the machine has other work.
"""

import argparse
import math
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tokenizers import Tokenizer

from conversations import Conversation, conversation
from export import ASSISTANT, BOS, CONFIG, END, SYSTEM, USER, save_tokenizer, save_weights, train_tokenizer
from model import DemoModel
from optimizer import optimizers

POOL = 768            # conversations drawn at a time, then sorted by length
ROWS_TIMES_LENGTH = 2048   # tokens in the batch of one process, padding included
USER_WEIGHT = 0.05     # the loss on what the user says: it teaches copying early, but is not the aim
FREE_WEIGHT = 0.3      # the loss on answers of which many would do (stories, lists): chance cannot be learned
FREE_MATCHES = ("story", "list")
WARMUP_STEPS = 60
TEXTS_FOR_TOKENIZER = 4000
SAVE_EVERY_S = 180


def encode(tokenizer: Tokenizer, pool: list[Conversation]) -> list[tuple[list[int], list[float]]]:
    """Token ids and loss weights of each conversation; those that are too long are left out."""
    contents = [message["content"].strip() for talk in pool for message in talk.messages()]
    encoded = iter(tokenizer.encode_batch_fast(contents, add_special_tokens=False))
    bos, end = tokenizer.token_to_id(BOS), tokenizer.token_to_id(END)
    marks = {role: tokenizer.token_to_id(mark) for role, mark in
             (("system", SYSTEM), ("user", USER), ("assistant", ASSISTANT))}
    rows = []
    for talk in pool:
        ids, weights = [bos], [0.0]
        answers = iter(talk.turns)
        for message in talk.messages():
            content = next(encoded).ids
            weight = USER_WEIGHT
            if message["role"] == "assistant":
                weight = FREE_WEIGHT if next(answers).match in FREE_MATCHES else 1.0
            ids += [marks[message["role"]], *content, end]
            weights += [0.0, *[weight] * len(content), weight]
        if len(ids) <= CONFIG["max_position_embeddings"]:
            rows.append((ids, weights))
    return rows


def batches(tokenizer: Tokenizer, rng: random.Random):
    """Endless batches (ids, weights), each [conversations, length], padded at the right with weight 0."""
    while True:
        rows = sorted(encode(tokenizer, [conversation(rng) for _ in range(POOL)]), key=lambda row: len(row[0]))
        ready = []
        while rows:
            length = len(rows[-1][0])
            taken = [rows.pop() for _ in range(min(len(rows), max(1, ROWS_TIMES_LENGTH // length)))]
            ids = torch.full((len(taken), length), CONFIG["pad_token_id"])
            weights = torch.zeros(len(taken), length)
            for row, (row_ids, row_weights) in enumerate(taken):
                ids[row, :len(row_ids)] = torch.tensor(row_ids)
                weights[row, :len(row_ids)] = torch.tensor(row_weights)
            ready.append((ids, weights))
        rng.shuffle(ready)
        yield from ready


def rate(step: int, steps: int) -> float:
    """Share of the peak learning rate: a short warm-up, then linear to zero."""
    return min((step + 1) / WARMUP_STEPS, 1 - step / steps)


def train(rank: int, args: argparse.Namespace, meeting: str) -> None:
    """The whole training, from the tokenizer to the exported folder; runs in each process, the first one writes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=args.processes)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    out, checkpoint = Path(args.out), Path(args.out) / "checkpoint.pt"
    if args.resume:
        tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    else:
        tokenizer = train_tokenizer(message["content"] for _ in range(TEXTS_FOR_TOKENIZER)
                                    for message in conversation(rng).messages())
    model = DemoModel(CONFIG)
    both = optimizers(model, args.matrix_lr, args.other_lr)
    begin, tokens = 0, 0
    if args.resume:
        state = torch.load(checkpoint)
        model.load_state_dict(state["model"])
        for optimizer, saved_state in zip(both, state["optimizers"]):
            optimizer.load_state_dict(saved_state)
        begin, tokens = state["step"], state["tokens"]
    elif rank == 0:
        save_tokenizer(tokenizer, out)

    def save(step: int) -> None:
        save_weights(model, out)
        torch.save({"model": model.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in both],
                    "step": step, "tokens": tokens}, checkpoint)

    stream = batches(tokenizer, random.Random(f"{args.seed} {begin} {rank}"))
    started = saved = time.monotonic()
    smooth, first_tokens = None, tokens
    for step in range(begin, args.steps):
        for optimizer in both:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate(step, args.steps)
        loss, seen = accumulate(model, *next(stream))
        tokens += seen
        for optimizer in both:
            optimizer.step()
            optimizer.zero_grad()
        smooth = loss if smooth is None else 0.98 * smooth + 0.02 * loss
        assert not math.isnan(smooth), "training diverged"
        now = time.monotonic()
        if rank == 0 and (step % 20 == 0 or step + 1 == args.steps):
            left = (now - started) / (step - begin + 1) * (args.steps - step - 1)
            print(f"step {step + 1}/{args.steps}  loss {smooth:.4f}  {tokens / 1e6:.2f} M tokens  "
                  f"{(tokens - first_tokens) / (now - started):.0f} tokens/s  {left / 60:.1f} min left", flush=True)
        if rank == 0 and now - saved > SAVE_EVERY_S:
            save(step + 1)
            saved = now
    if rank == 0:
        save(args.steps)
        checkpoint.unlink()
        print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, "
              f"{(time.monotonic() - started) / 60:.1f} minutes, final loss {smooth:.4f}; written to {out}")
    dist.destroy_process_group()


def accumulate(model: DemoModel, ids: torch.Tensor, weights: torch.Tensor) -> tuple[float, int]:
    """Gradients of the mean loss over the batches of all processes; returns that loss and the tokens seen."""
    loss = model.loss(ids, weights)
    loss.backward()
    parameters = list(model.parameters())
    sums = torch.tensor([loss.item(), weights[:, 1:].sum().item(), float(ids.numel())])
    flat = torch.cat([parameter.grad.flatten() for parameter in parameters] + [sums])
    dist.all_reduce(flat)
    loss_sum, weight_sum, seen = flat[-3:].tolist()
    flat /= weight_sum
    offset = 0
    for parameter in parameters:
        parameter.grad.copy_(flat[offset:offset + parameter.numel()].view_as(parameter))
        offset += parameter.numel()
    return loss_sum / weight_sum, int(seen)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default=str(Path(__file__).parent / "weights"))
    parser.add_argument("--steps", type=int, default=3200)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--processes", type=int, default=2, help="one core each")
    parser.add_argument("--matrix-lr", type=float, default=0.02)
    parser.add_argument("--other-lr", type=float, default=0.006)
    parser.add_argument("--resume", action="store_true", help="go on from OUT/checkpoint.pt")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # an exit, so that the processes end as well
        mp.spawn(train, (arguments, f"{folder}/meeting"), nprocs=arguments.processes, daemon=True)
