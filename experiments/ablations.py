"""Runs the study of PROTOCOL.md: launches the training and evaluation scripts as a user would.

    python experiments/ablations.py                              all arms and seeds, on the test bed
    python experiments/ablations.py --only grpo tgrpo --seeds 100 101              two pilot seeds
    python experiments/ablations.py --report                     report.md and figures from results
    python experiments/ablations.py --model runs/sft/model --data D.json --val_data V.json \\
        --nproc_per_node 8 --only grpo tgrpo -- --max_steps 500

One process and one thread a run, as many runs at a time as there are cores. The same command
resumes: a run with a file in the results is not repeated, and the scripts resume theirs. A run that
fails after its first step is recorded as failed, reported, and not repeated either. Whatever else
fails (no data, a flag that a script refuses) ends the study with the script's own words.

With --model (the SFT model), --data and --val_data the same arms run on real data, one at a time on
--nproc_per_node GPUs, with the paper's defaults; flags after -- go to train_rl.py, and those of
SHARED to eval.py too. Arms that need the bed are left out.

Imports nothing of what it studies: it reads metrics.jsonl and eval.py's results.
"""

import argparse
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.arms import ARMS, FIRST_PILOT, Arm
from experiments.records import about, by_kind, curves, once, read_lines, write_json

ROOT = Path(__file__).resolve().parents[1]
SHARED = ("max_frames", "max_new_tokens", "num_workers", "prompt_template")


class Stopped(Exception):
    """A script was asked to stop before its end; the same command resumes it."""


class Failed(Exception):
    """A script ended with an error; says which, and its last words."""


@dataclass
class Study:
    """What all runs share: the command line, and the scripts that run at this moment.

    extra: flags for train_rl.py from the user. lock: an open file, see claim.
    """

    options: argparse.Namespace
    extra: dict[str, str]
    lock: object
    running: set[subprocess.Popen] = field(default_factory=set)
    stopping: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self):
        self.folder, self.on_bed = self.options.folder, not self.options.model
        self.bed = self.folder / "bed"
        self.sft_flags, self.rl_flags = {}, {}
        self.eval_flags = {key: self.extra[key] for key in SHARED if key in self.extra}
        self.eval_flags |= {"temperature": 1.0, "top_p": 1.0}
        if self.on_bed:
            from experiments.shortcut import EVAL_FLAGS, RL_FLAGS, SFT_FLAGS

            self.sft_flags, self.rl_flags, self.eval_flags = SFT_FLAGS, RL_FLAGS, EVAL_FLAGS

    def run_folder(self, name: str, seed: int) -> Path:
        return self.folder / name / f"seed_{seed}"

    def start_of(self, seed: int) -> Path:
        """The SFT model: on the bed one for each seed, which its arms share."""
        model = self.run_folder("sft", seed) / "model"
        return model if self.on_bed else Path(self.options.model)

    def result_file(self, name: str, seed: int) -> Path:
        return self.options.results / f"{name}.seed_{seed}.json"


# ----------------------------------------------------------------------------------------- one run


def launch(study: Study, script: str, flags: dict, log: Path) -> None:
    """Run a script to its end, its output appended to a file. Raises Stopped or Failed."""
    num_ranks = study.options.nproc_per_node
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}"]
    command = [sys.executable, *(torchrun if num_ranks > 1 else []), str(ROOT / script)]
    command += [f"--{key}={value}" for key, value in flags.items()]
    alone = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # one core, the same bits again
    environment = os.environ | (alone if study.on_bed else {})
    log.parent.mkdir(parents=True, exist_ok=True)
    if study.stopping.is_set():
        raise Stopped
    with log.open("a") as file:
        # A session of its own: Ctrl-C reaches this process alone, which asks each script once.
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment,
            start_new_session=True, pass_fds=[study.lock.fileno()],
        )  # fmt: skip
    study.running.add(process)
    if study.stopping.is_set():  # since the look above: not among those that were asked
        process.terminate()
    code = process.wait()
    study.running.discard(process)
    if study.stopping.is_set():
        raise Stopped
    if code:
        last = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
        raise Failed(f"{script} ended with exit code {code} ({log}):\n{last}")


def train(study: Study, script: str, flags: dict, folder: Path) -> Path:
    """Train, or resume; the folder of the model. Raises Stopped or Failed."""
    if not (folder / "model").is_dir():
        launch(study, script, flags | {"output_dir": folder}, folder.with_suffix(".log"))
    if not (folder / "model").is_dir():  # asked to stop by a file named `stop`
        raise Stopped
    return folder / "model"


def cold_start(study: Study, seed: int) -> Path:
    """Stage 1 on the bed."""
    flags = {"model": study.bed / "base", "data": study.bed / "data/sft.json", "seed": seed}
    return train(study, "train_sft.py", flags | study.sft_flags, study.run_folder("sft", seed))


def rl_flags(study: Study, arm: Arm, seed: int) -> dict:
    """The flags of train_rl.py for an arm and a seed, all but the output folder."""
    if not arm.trains:
        return {}
    model = study.start_of(seed) if arm.model == "sft" else study.bed / "base"
    data = study.bed / f"data/{arm.data}.json" if study.on_bed else study.options.data
    flags = {"model": str(model), "data": str(data), "seed": seed}
    flags |= study.rl_flags | study.extra | arm.flags
    if arm.times_steps > 1:
        flags["max_steps"] = arm.times_steps * int(flags.get("max_steps", 1000))
    if flags.get("data_types") == "video":  # as many videos a step as the other arms have
        rows = json.loads(Path(flags["data"]).read_text(encoding="utf-8"))
        share = sum(row["data_type"] == "video" for row in rows) / len(rows)
        flags["prompts_per_step"] = round(share * int(flags.get("prompts_per_step", 8)))
    return flags


def recorded(flags: dict) -> dict[str, str]:
    """Flags as a result has them: texts, and paths that hold on another machine too."""
    return {key: str(value).replace(f"{ROOT}/", "") for key, value in flags.items()}


def run_one(study: Study, name: str, seed: int) -> dict:
    """Train and evaluate one arm with one seed and record it. Returns the record."""
    arm, folder, begun = ARMS[name], study.run_folder(name, seed), time.monotonic()
    flags, metrics = rl_flags(study, arm, seed), folder / "metrics.jsonl"
    record = {"arm": name, "seed": seed, "flags": recorded(flags), "error": None, **about()}
    before = stamp(metrics)
    try:
        model = study.start_of(seed)
        if arm.trains:
            model = train(study, "train_rl.py", flags, folder)
    except Failed as error:
        if stamp(metrics) == before:  # it took no step: not the arm's doing
            raise
        record["error"] = str(error)
    else:
        record["accuracy"] = evaluate(study, model, folder.parent / f"{folder.name}_eval", seed)
    record["seconds"] = round(time.monotonic() - begun)  # of this attempt
    record["curves"] = curves(read_lines(metrics)) if arm.trains else {}
    write_json(study.result_file(name, seed), record)
    return record


def evaluate(study: Study, model: Path, folder: Path, seed: int) -> dict:
    """Accuracy at temperature 1 by order of frames and kind of item.

    On the bed four samples an item with the frames in order, since test.json holds each item four
    times, and one with the frames shuffled; on real data one each.
    """
    jobs = {Path(study.options.val_data): "ordered,shuffled"}
    if study.on_bed:
        data = study.bed / "data"
        jobs = {data / "test.json": "ordered", data / "test_once.json": "shuffled"}
    found = {}
    for data, orders in jobs.items():
        flags = {"model": model, "data": data, "order": orders, "output_dir": folder, "seed": seed}
        launch(study, "eval.py", flags | study.eval_flags, folder.with_suffix(".log"))
        for order in orders.split(","):
            (file,) = folder.rglob(f"{data.stem}.{order}.jsonl")
            found[order] = by_kind(read_lines(file))
    return found


def stamp(file: Path) -> tuple | None:
    """Changes whenever the file is written to."""
    return (file.stat().st_mtime_ns, file.stat().st_size) if file.exists() else None


# --------------------------------------------------------------------------------------- all runs


def is_recorded(study: Study, name: str, seed: int) -> bool:
    """Whether a run has a result; an error if that was made with other flags."""
    file = study.result_file(name, seed)
    if not file.exists():
        return False
    now = recorded(rl_flags(study, ARMS[name], seed))
    before = json.loads(file.read_text(encoding="utf-8"))["flags"]
    if before != now:
        sys.exit(f"error: {file} is of other flags: move it away, or name another --results\n"
                 f"then {before}\nnow  {now}")  # fmt: skip
    return True


def run_study(study: Study) -> None:
    """All runs that are not recorded yet: the arms of many seeds first, and within them by seed."""
    only, seeds = study.options.only, study.options.seeds
    names = [name for name in only or ARMS if study.on_bed or not ARMS[name].needs_bed]
    jobs = [(name, seed) for name in names for seed in seeds or range(ARMS[name].num_seeds)]
    if study.on_bed:
        launch(study, "experiments/shortcut.py", {"folder": study.bed}, study.folder / "bed.log")
        once(study.bed / "data")
    jobs = [job for job in jobs if not is_recorded(study, *job)]
    jobs.sort(key=lambda job: (-ARMS[job[0]].num_seeds, job[1]))
    starts = sorted({seed for _, seed in jobs}) if study.on_bed else []
    workers = (os.cpu_count() or 1) if study.on_bed else 1
    total = len(starts) + len(jobs)
    with ThreadPoolExecutor(workers) as pool, tqdm(total=total, unit="run", smoothing=0) as bar:
        try:
            for _ in pool.map(lambda seed: cold_start(study, seed), starts):
                bar.update()
            for done in as_completed([pool.submit(run_one, study, *job) for job in jobs]):
                try:
                    bar.write(line_of(done.result()))
                except Stopped:
                    bar.write("a run was asked to stop before its end: the same command resumes it")
                bar.update()
        finally:  # after an error or Ctrl-C nothing new starts, and what runs saves and ends
            study.stopping.set()
            for process in list(study.running):
                process.terminate()
            pool.shutdown(cancel_futures=True)


def line_of(record: dict) -> str:
    """A finished run on the console."""
    title = f"{record['arm']} seed {record['seed']}, {record['seconds']} s: "
    if record["error"]:
        return f"{title}FAILED, recorded: {record['error']}"
    scores = record["accuracy"]["ordered"].items()
    return title + ", ".join(f"{kind} {100 * part['score']:.1f}" for kind, part in scores)


def claim(folder: Path):
    """Hold the folder's lock until this process and the scripts that it started have ended."""
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / "lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(f"error: a study, or a script of one that was killed, still writes to {folder}")
    return file


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--seeds", nargs="+", type=int, default=[], help="instead of each arm's own")
    add("--only", nargs="+", choices=ARMS, default=[], metavar="ARM", help=", ".join(ARMS))
    add("--report", action="store_true", help="run nothing: table and figures from the results")
    add("--folder", type=Path, default=Path("runs/ablations"), help="of the bed and the runs")
    add("--results", type=Path, help="default: experiments/results; with --model, and of pilot "
        f"seeds ({FIRST_PILOT} and above), FOLDER/results")  # fmt: skip
    add("--model", default="", help="the SFT model of a study on real data")
    add("--data", default="", help="with --model: data file of RL")
    add("--val_data", default="", help="with --model: data file of the evaluation")
    add("--nproc_per_node", type=int, default=1, help="with --model: processes of a run")
    add("extra", nargs="*", metavar="-- --NAME VALUE ..", help="with --model: to train_rl.py")
    options = parser.parse_args()
    real = (options.model, options.data, options.val_data)
    if any(real) != all(real) or not any(real) and (options.extra or options.nproc_per_node > 1):
        parser.error("--model, --data and --val_data go together, and --nproc_per_node and flags "
                     "for train_rl.py with them")  # fmt: skip
    names, values = options.extra[::2], options.extra[1::2]
    if len(names) != len(values) or not all(name.startswith("--") for name in names):
        parser.error("after -- stand flags of train_rl.py, each with one value: --name value")
    is_of_record = not options.model and all(seed < FIRST_PILOT for seed in options.seeds)
    default = ROOT / "experiments/results" if is_of_record else options.folder / "results"
    options.results = options.results or default
    return options


def main() -> None:
    options = parse()
    if options.report:
        from experiments.report import write_report  # needs matplotlib

        return write_report(options.results, options.seeds)
    extra = {key[2:]: value for key, value in zip(options.extra[::2], options.extra[1::2],
                                                  strict=True)}  # fmt: skip
    study = Study(options, extra, claim(options.folder))

    def interrupt(*_):
        raise KeyboardInterrupt

    for name in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, interrupt)
    try:
        run_study(study)
    except Failed as error:
        sys.exit(f"error: {error}")
    except (KeyboardInterrupt, Stopped):
        print("stopped: the same command resumes", file=sys.stderr)
        sys.exit(130)
    print(f"results in {options.results}")


if __name__ == "__main__":
    main()
