"""Trains the demo model: `python models/demo/train.py --out models/demo/weights`.

The text is drawn while training, so no example is seen twice except where the task has few. Conversations of like
length share a batch and each begins at position 0, exactly as the server runs them: no packing, no masks. A step
takes two batches, in one process or in two: two meet once per step instead of once per operation, as threads would.
Processor time is printed and recorded beside the time on the clock, because only the former says what an idle machine
would take.
"""

import argparse
import json
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

from conversations import EARLY, HARD, Conversation, conversation
from export import ASSISTANT, BOS, CONFIG, END, SYSTEM, USER, save_tokenizer, save_weights, train_tokenizer
from model import FAST_BF16, DemoModel
from optimizer import optimizers

STEPS = 4100
POOL = 768            # conversations drawn at a time, then sorted by length
ROWS_TIMES_LENGTH = 2048   # tokens in a batch, padding included
BATCHES = 2            # in a step
USER_WEIGHT = 0.05     # the loss on what the user says: it teaches copying early, but is not the aim
FREE_WEIGHT = 0.3      # the loss on answers of which many would do (stories, lists): chance cannot be learned
FREE_MATCHES = ("story", "list")
# Longer answers weigh as the root of their length, so that times tables do not drown the rest; later they count fully.
FULL_WEIGHT_TOKENS, FULL_WEIGHT_TOKENS_LATE = 8, 40
LATE = 2400            # the step from which on the harder mix is drawn
# (step, share of the peak learning rate): a short warm-up, level, down to where the harder mix begins, slower to zero.
RATES = [(-1, 0.0), (59, 1.0), (1500, 1.0), (LATE, 0.5), (STEPS, 0.0)]
TEXTS_FOR_TOKENIZER = 4000
SAVE_EVERY_S = 180
STARTED = time.monotonic()


def encode(tokenizer: Tokenizer, pool: list[Conversation], full_weight: int) -> list[tuple[list[int], list[float]]]:
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
                free = next(answers).match in FREE_MATCHES
                weight = FREE_WEIGHT if free else min(1.0, (full_weight / len(content)) ** 0.5)
            ids += [marks[message["role"]], *content, end]
            weights += [0.0, *[weight] * len(content), weight]
        if len(ids) <= CONFIG["max_position_embeddings"]:
            rows.append((ids, weights))
    return rows


def batches(tokenizer: Tokenizer, rng: random.Random):
    """Endless batches (ids, weights), each [conversations, length], padded at the right with weight 0."""
    given = 0
    while True:
        shares, full_weight = (HARD, FULL_WEIGHT_TOKENS_LATE) if given >= LATE else (EARLY, FULL_WEIGHT_TOKENS)
        pool = [conversation(rng, shares=shares) for _ in range(POOL)]
        rows = sorted(encode(tokenizer, pool, full_weight), key=lambda row: len(row[0]))
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
        given += len(ready)
        yield from ready


def rate(step: int) -> float:
    """Share of the peak learning rate: straight lines between the points of `RATES`."""
    (left, low), (right, high) = next(pair for pair in zip(RATES, RATES[1:]) if step <= pair[1][0])
    return low + (high - low) * (step - left) / (right - left)


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
    begin, tokens, cpu_before, wall_before = 0, 0, 0.0, 0.0
    if args.resume:
        state = torch.load(checkpoint)
        model.load_state_dict(state["model"])
        for optimizer, saved_state in zip(both, state["optimizers"]):
            optimizer.load_state_dict(saved_state)
        begin, tokens, cpu_before, wall_before = (state[key] for key in ("step", "tokens", "cpu_s", "wall_s"))
    elif rank == 0:
        save_tokenizer(tokenizer, out)

    def save(step: int) -> None:
        save_weights(model, out)
        torch.save({"model": model.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in both],
                    "step": step, "tokens": tokens, "cpu_s": cpu, "wall_s": wall}, checkpoint)

    streams = [batches(tokenizer, random.Random(f"{args.seed} {i}")) for i in range(rank, BATCHES, args.processes)]
    for _ in range(begin):  # a run that goes on sees what it would have seen had it not been stopped
        for stream in streams:
            next(stream)
    saved, smooth = time.monotonic(), None
    for step in range(begin, args.steps):
        for optimizer in both:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate(step)
        loss, seen, cpu = accumulate(model, [next(stream) for stream in streams])
        tokens, cpu, wall = tokens + seen, cpu_before + cpu, wall_before + time.monotonic() - STARTED
        for optimizer in both:
            optimizer.step()
            optimizer.zero_grad()
        smooth = loss if smooth is None else 0.98 * smooth + 0.02 * loss
        assert not math.isnan(smooth), "training diverged"
        if rank == 0 and (step % 20 == 0 or step + 1 == args.steps):
            print(f"step {step + 1}/{args.steps}  loss {smooth:.4f}  {tokens / 1e6:.2f} M tokens  "
                  f"{cpu / 60:.1f} CPU-minutes  {wall / 60:.1f} minutes  {tokens / cpu:.0f} tokens/CPU-s", flush=True)
        if rank == 0 and time.monotonic() - saved > SAVE_EVERY_S:
            save(step + 1)
            saved = time.monotonic()
    if rank == 0:
        save(args.steps)
        checkpoint.unlink()
        (out / "training.json").write_text(json.dumps({
            "parameters": sum(p.numel() for p in model.parameters()), "steps": args.steps, "tokens": tokens,
            "loss": round(smooth, 4), "resumed": args.resume, "bf16_products": FAST_BF16, "torch": torch.__version__,
            "processes": args.processes, "cpu_minutes": round(cpu / 60, 1), "wall_minutes": round(wall / 60, 1),
        }, indent=2) + "\n")
        print(f"final loss {smooth:.4f}, {cpu / 60:.1f} CPU-minutes, {wall / 60:.1f} minutes; written to {out}")
    dist.destroy_process_group()


def accumulate(model: DemoModel, step: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[float, int, float]:
    """Gradients of the mean loss over the batches of all processes; returns that loss, the tokens seen, and the
    seconds of processor time that all processes have taken since they started."""
    sums = torch.zeros(4)
    for ids, weights in step:
        loss = model.loss(ids, weights)
        loss.backward()
        sums += torch.tensor([loss.item(), weights[:, 1:].sum().item(), ids.numel(), 0.0])
    sums[3] = time.process_time()
    parameters = list(model.parameters())
    flat = torch.cat([parameter.grad.flatten() for parameter in parameters] + [sums])
    dist.all_reduce(flat)
    loss_sum, weight_sum, seen, cpu = flat[-4:].tolist()
    flat /= weight_sum
    offset = 0
    for parameter in parameters:
        parameter.grad.copy_(flat[offset:offset + parameter.numel()].view_as(parameter))
        offset += parameter.numel()
    return loss_sum / weight_sum, int(seen), cpu


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default=str(Path(__file__).parent / "weights"))
    parser.add_argument("--steps", type=int, default=STEPS, help="fewer, to try something out")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--processes", type=int, default=BATCHES, choices=(1, BATCHES), help="one core each")
    parser.add_argument("--matrix-lr", type=float, default=0.02)
    parser.add_argument("--other-lr", type=float, default=0.006)
    parser.add_argument("--resume", action="store_true", help="go on from OUT/checkpoint.pt")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # an exit, so that the processes end as well
        mp.spawn(train, (arguments, f"{folder}/meeting"), nprocs=arguments.processes, daemon=True)
