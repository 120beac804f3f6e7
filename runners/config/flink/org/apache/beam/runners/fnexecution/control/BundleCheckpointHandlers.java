package org.apache.beam.runners.fnexecution.control;

import java.util.Collection;
import org.apache.beam.model.fnexecution.v1.BeamFnApi.BundleApplication;
import org.apache.beam.model.fnexecution.v1.BeamFnApi.DelayedBundleApplication;
import org.apache.beam.model.fnexecution.v1.BeamFnApi.ProcessBundleResponse;
import org.apache.beam.runners.core.StateInternalsFactory;
import org.apache.beam.runners.core.StateNamespace;
import org.apache.beam.runners.core.StateNamespaces;
import org.apache.beam.runners.core.StateTag;
import org.apache.beam.runners.core.StateTags;
import org.apache.beam.runners.core.TimerInternalsFactory;
import org.apache.beam.sdk.coders.Coder;
import org.apache.beam.sdk.coders.CoderException;
import org.apache.beam.sdk.state.TimeDomain;
import org.apache.beam.sdk.state.ValueState;
import org.apache.beam.sdk.transforms.windowing.BoundedWindow;
import org.apache.beam.sdk.util.CoderUtils;
import org.apache.beam.sdk.values.WindowedValue;
import org.apache.beam.vendor.grpc.v1p69p0.com.google.protobuf.Duration;
import org.apache.beam.vendor.grpc.v1p69p0.com.google.protobuf.Timestamp;
import org.joda.time.Instant;

/**
 * Takes the place of Beam's class of this name: what a splittable DoFn left undone is kept, and done later.
 *
 * <p>Beam's own gives each residual a state of its own name, which Flink then keeps for ever, and cuts delays and
 * watermarks to whole seconds. Here an element has one state, which its next residual overwrites, and times are exact
 * to the millisecond. So an element has one residual at a time: right for sources, each of which is one element; equal
 * elements in one stage would be taken for one.
 */
public class BundleCheckpointHandlers {

  private BundleCheckpointHandlers() {}

  /** Sets a timer for each residual and keeps it until that fires, under the element's own key. */
  public static class StateAndTimerBundleCheckpointHandler<T> implements BundleCheckpointHandler {

    /** What the ids of these timers begin with. The operator finds the state by the timer's id. */
    public static final String SDF_PREFIX = "sdf_checkpoint";

    private final TimerInternalsFactory<T> timers;
    private final StateInternalsFactory<T> states;
    private final Coder<WindowedValue<T>> residualCoder;
    private final Coder<BoundedWindow> windowCoder;
    private final StateTag<ValueState<WindowedValue<T>>> kept;

    @SuppressWarnings({"rawtypes", "unchecked"}) // as the operator calls it
    public StateAndTimerBundleCheckpointHandler(
        TimerInternalsFactory<T> timers,
        StateInternalsFactory<T> states,
        Coder<WindowedValue<T>> residualCoder,
        Coder windowCoder) {
      this.timers = timers;
      this.states = states;
      this.residualCoder = residualCoder;
      this.windowCoder = windowCoder;
      this.kept = StateTags.value(SDF_PREFIX, residualCoder);
    }

    /** Whether a timer is one of these. */
    public static boolean isSdfTimer(String timerId) {
      return timerId.startsWith(SDF_PREFIX);
    }

    @Override
    public void onCheckpoint(ProcessBundleResponse response) {
      for (DelayedBundleApplication residual : response.getResidualRootsList()) {
        if (residual.hasApplication()) {
          keep(residual.getApplication(), residual.getRequestedTimeDelay());
        }
      }
    }

    private void keep(BundleApplication application, Duration delay) {
      WindowedValue<T> undone;
      try {
        undone = CoderUtils.decodeFromByteArray(residualCoder, application.getElement().toByteArray());
      } catch (CoderException error) {
        throw new IllegalStateException("a residual that cannot be read", error);
      }
      Instant due = Instant.now().plus(millis(delay.getSeconds(), delay.getNanos()));
      Instant held = earliest(application.getOutputWatermarksMap().values());
      for (WindowedValue<T> one : undone.explodeWindows()) {
        StateNamespace space = StateNamespaces.window(windowCoder, one.getWindows().iterator().next());
        timers.timerInternalsForKey(one.getValue())
            .setTimer(space, SDF_PREFIX, "", due, held, TimeDomain.PROCESSING_TIME);
        states.stateInternalsForKey(one.getValue()).state(space, kept).write(one);
      }
    }

    /** How far outputs have come; the beginning of time if that is not known. */
    private static Instant earliest(Collection<Timestamp> watermarks) {
      return watermarks.stream()
          .map(one -> Instant.ofEpochMilli(millis(one.getSeconds(), one.getNanos())))
          .map(one -> one.isAfter(BoundedWindow.TIMESTAMP_MAX_VALUE) ? BoundedWindow.TIMESTAMP_MAX_VALUE : one)
          .min(Instant::compareTo)
          .orElse(BoundedWindow.TIMESTAMP_MIN_VALUE);
    }

    private static long millis(long seconds, int nanos) {
      return seconds * 1000 + nanos / 1_000_000;
    }
  }
}
