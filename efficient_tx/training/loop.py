"""The training loop: steps, metric lines, checkpoints and evaluations of one run, new or resumed."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence

import grain
import jax
import jax.numpy as jnp
from flax import nnx

from efficient_tx.numerics.flops import of_program
from efficient_tx.task import Batch
from efficient_tx.training import metrics
from efficient_tx.training.checkpoint import Checkpoints
from efficient_tx.training.errors import Interrupted, NonFinite
from efficient_tx.training.evaluation import Scores, make_evaluate, prefetch
from efficient_tx.training.history import History
from efficient_tx.training.memory import needed
from efficient_tx.training.optimizer import evaluation_params
from efficient_tx.training.profiler import Profiler
from efficient_tx.training.report import Report
from efficient_tx.training.signals import StopSignals
from efficient_tx.training.stages import Stage, enter, stage_at
from efficient_tx.training.step import State, clear_window, init_state, make_train_step, replicate
from efficient_tx.training.summary import parameter_count


@dataclasses.dataclass(frozen=True)
class Plan:
    """The length of a run and its intervals, in steps. The last step is followed by line, evaluation and checkpoint.

    Attributes:
      steps: updates of the run.
      batch_size: examples of a step, over all devices and processes.
      log_every: steps between train lines.
      eval_every: steps between evaluations, each with a checkpoint.
      checkpoint_every: steps between further checkpoints.
      keep: number of newest checkpoints to keep, besides the best one.
    """

    steps: int
    batch_size: int
    log_every: int
    eval_every: int
    checkpoint_every: int
    keep: int

    def logs(self, step: int) -> bool:
        """Whether a train line follows `step`."""
        return step % self.log_every == 0 or step == self.steps

    def validates(self, step: int) -> bool:
        """Whether an evaluation follows `step`."""
        return step % self.eval_every == 0 or step == self.steps

    def saves(self, step: int) -> bool:
        """Whether a checkpoint follows `step`."""
        return step % self.checkpoint_every == 0 or self.validates(step)


class Stopwatch:
    """Wall time of training since the last train line, without compilation, evaluation and saving."""

    def __init__(self):
        self._started = None
        self.clear()

    def clear(self) -> None:
        """Forgets the time so far."""
        self.steps, self.seconds, self.data_seconds = 0, 0.0, 0.0

    def start(self, at: float) -> None:
        """Starts at the time `at`; does nothing if the watch is running."""
        if self._started is None:
            self._started = at

    def stop(self) -> bool:
        """Stops, and returns whether the watch was running."""
        running = self._started is not None
        if running:
            self.seconds += time.perf_counter() - self._started
            self._started = None
        return running


class Loop:
    """One run.

    After each step the loop does what is due, in this order: a train line, the next stage, a checkpoint, a validation
    line. A stage begins with a checkpoint of its new state. A checkpoint holds the open window of training sums. A
    resumed run first drops the lines after its step, and evaluates if the validation line of its step is missing. So a
    run that was killed at any point and resumed writes the same lines. A run of no steps saves and evaluates the
    parameters that it starts from.

    Args:
      stages: from `make_stages`; the run starts from the parameters of the first stage's model.
      schedule: schedule(updates done before) is the learning rate in the train lines.
      batches: element i is this process's rows of the batch of step i.
      validation: batches that hold every item of the validation split once.
      plan: length and intervals of the run.
      checkpoints, history, report: those of the workdir, which this process owns.
      seed: seed of dropout and sampling.
      grad_accum, lengths: as in `make_train_step`.
      profiler: traces some of the steps.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        schedule: Callable,
        *,
        batches: grain.MapDataset,
        validation: grain.MapDataset,
        plan: Plan,
        checkpoints: Checkpoints,
        history: History,
        report: Report,
        seed: int,
        grad_accum: int = 1,
        lengths: int = 1,
        profiler: Profiler | None = None,
    ):
        self._stages, self._schedule = stages, schedule
        self._batches, self._validation, self._plan = batches, validation, plan
        self._checkpoints, self._history, self._report = checkpoints, history, report
        self._writer = jax.process_index() == 0
        self._seed, self._profiler = seed, profiler or Profiler()
        self._division = {"grad_accum": grad_accum, "lengths": lengths}
        self._watch = Stopwatch()
        self.compile_seconds = 0.0
        self._use(stages[0])

    def _use(self, stage: Stage) -> None:
        """Switches training and evaluation to `stage`; the first step with each shape of batches compiles."""
        graphdef = nnx.split(stage.model)[0]
        self._stage, self._objective = stage, stage.objective
        self._compiled = set()
        self._train_step = make_train_step(
            graphdef,
            stage.optimizer,
            seed=self._seed,
            objective=stage.objective,
            given=stage.given,
            **self._division,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        self.evaluate: Callable[..., Scores] = make_evaluate(graphdef, stage.objective, given=stage.given)

    def run(self) -> State:
        """Trains up to the last step and returns the state there.

        `compile_seconds` is then the time of the first steps of this process, one for each stage and shape of batches.
        It includes tracing, compilation (or loading the program from the cache) and the step itself.

        Raises:
          Interrupted: a signal arrived; the state is saved.
          NonFinite: the loss, a gradient or a parameter is not finite; such a state is never saved.
          RunError: a file cannot be written.
          Refused: there are checkpoints, but none can be used.
        """
        step, state = self._restore()
        self._report.start(step)
        try:
            with StopSignals() as signals:
                if not self._plan.steps and not self._checkpoints.steps():
                    self._save(state, step)
                if self._checkpoints.steps() and self._plan.validates(step) and not self._history.validated(step):
                    self._validate(state, step, signals)
                batches = prefetch(self._batches, step, self._plan.steps)
                while step < self._plan.steps:
                    self._profiler.before(step + 1, state)
                    state = self._advance(state, batches)
                    step += 1
                    self._profiler.after(step, state, self._report.say)
                    self._report.progress(step)
                    signal = signals.after(step)
                    if self._plan.logs(step):
                        state = self._log(state, step)
                    stage = stage_at(self._stages, step)
                    begins = stage is not self._stage
                    if begins:
                        state = self._enter(stage, state)
                    if signal or begins or self._plan.saves(step):
                        self._save(state, step)
                    if signal:
                        raise Interrupted(signal, f"step {step} of {self._plan.steps} is saved")
                    if self._plan.validates(step):
                        self._validate(state, step, signals)
        finally:
            self._profiler.close()
            self._report.close()
        return state

    def _restore(self) -> tuple[int, State]:
        """The step and the state to start from: the newest usable checkpoint, else step 0."""
        if self._writer:
            self._checkpoints.open()
            self._checkpoints.clean()
        step, state = self._checkpoints.first_usable(
            self._checkpoints.steps()[::-1], lambda step: stage_at(self._stages, step).like(), self._report.say
        )
        if step is None:
            step, state = 0, init_state(self._stage.model, self._stage.optimizer, self._objective)
            if self._history.of("validation"):
                self._report.say(f"{self._checkpoints.directory} has lost its checkpoints: starting from step 0 again")
        else:
            self._report.say(f"resuming from step {step} of {self._plan.steps}")
            if stage_at(self._stages, step) is not self._stage:
                self._use(stage_at(self._stages, step))
        self._history.rewind(step, self._checkpoints.directory / str(step), self._report.say)
        return step, replicate(state)

    def _enter(self, stage: Stage, state: State) -> State:
        """The first state of `stage`."""
        self._settle(state)
        before = self._stage
        self._use(stage)
        old, new = (parameter_count(one.model) for one in (before, stage))
        if new != old:
            self._report.say(f"step {stage.start}/{self._plan.steps}  {old:,} parameters become {new:,}")
        return replicate(enter(state, before, stage))

    def _advance(self, state: State, batches: Iterator[Batch]) -> State:
        """Runs one step. The host waits for the batch, and for the device only at a first step, which compiles."""
        asked = time.perf_counter()
        batch = next(batches)
        arrived = time.perf_counter()
        shape = batch["inputs"].shape
        if shape in self._compiled:
            self._watch.start(asked)
            state = self._train_step(state, batch)
            self._watch.steps += 1
            self._watch.data_seconds += arrived - asked
            return state
        jax.block_until_ready(state)
        if self._watch.stop():
            self._watch.data_seconds += arrived - asked
        state = self._train_step(state, batch)
        jax.block_until_ready(state)
        seconds = time.perf_counter() - arrived
        self.compile_seconds += seconds
        length = f" of length {shape[2]}" if self._compiled else ""
        self._report.say(f"first step{length}: {seconds:.1f} s with compilation")
        self._report.say(self._cost(state, batch))
        self._compiled.add(shape)
        return state

    def _cost(self, state: State, batch: Batch) -> str:
        """A line on a step that ran: its program is at hand, and nothing is compiled."""
        compiled = self._train_step.lower(state, batch).compile()
        memory = f"{needed(compiled) / 2**20:,.1f} MiB" if compiled.memory_analysis() else "an unknown amount"
        count = of_program(lambda: self._train_step.trace(state, batch))
        most = "at most " if self._division["lengths"] > 1 else ""
        products = "not counted" if count is None else f"{most}{count:.3g} FLOP"
        return f"  on each device {memory} of memory, as compiled; matrix products and solves: {products} a step"

    def _log(self, state: State, step: int) -> State:
        """Writes the train line; returns the state with an empty window."""
        self._settle(state)
        watch = self._watch
        means = metrics.means(state.window)
        self._report.add(
            {
                "step": step,
                "split": "train",
                **{name: means[name] for name in self._objective.names},
                "learning_rate": float(self._schedule(step - 1)),
                "grad_norm": means["grad_norm"],
                "examples_per_second": self._plan.batch_size * watch.steps / watch.seconds if watch.steps else None,
                "seconds": watch.seconds,
                "data_seconds": watch.data_seconds,
            }
        )
        watch.clear()
        return clear_window(state)

    def _save(self, state: State, step: int) -> None:
        """Writes the checkpoint of `step`."""
        self._settle(state)
        if not _all_finite(state.params):
            raise NonFinite(f"the update of step {step} left parameters that are not finite. {self._advice()}")
        self._checkpoints.save(step, state)
        self._history.copy(self._checkpoints.directory / str(step))
        self._prune(step)

    def _validate(self, state: State, step: int, signals: StopSignals) -> None:
        """Writes the validation line of `step`, which has a checkpoint. A signal stops it between two batches."""

        def check():
            if signals.received and jax.process_count() == 1:
                raise Interrupted(signals.received, f"step {step} of {self._plan.steps} is saved")

        params = evaluation_params(state.optimizer, state.params)
        scores = self.evaluate(params, self._validation, check)
        self._report.add({"step": step, "split": "validation", **scores.means})
        self._history.copy(self._checkpoints.directory / str(step))
        self._report.draw()
        self._prune(step)

    def _prune(self, step: int) -> None:
        if self._writer:
            best = next(iter(self._history.ranked(self._objective)), None)
            self._checkpoints.prune(self._plan.keep, newest=step, best=best)

    def _settle(self, state: State) -> None:
        """Waits for the device, stops the watch, and raises NonFinite if a step went wrong."""
        jax.block_until_ready(state.step)
        self._watch.stop()
        bad = int(state.bad_step)
        if bad >= 0:
            raise NonFinite(f"the loss or the gradient of step {bad} is not finite. {self._advice()}")

    def _advice(self) -> str:
        steps = self._checkpoints.steps()
        saved = f"The newest checkpoint is that of step {steps[-1]}" if steps else "No checkpoint was written yet"
        remedies = "a smaller optimizer.learning_rate, a longer warmup or a smaller clip"
        return f"{saved}. In a new workdir, {remedies} may help; debug_nans=True shows the line where a NaN comes up"


@jax.jit
def _all_finite(tree: nnx.State) -> jax.Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()
