//! What a run leaves behind: its trace, and what its servers logged. Both belong to the thread that runs it.

use std::cell::RefCell;
use std::fmt::Write as _;
use std::sync::Once;

use tokio::time::Instant;
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::{Event, Level, Metadata, Subscriber};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt as _};

/// Bytes of a trace; a longer one is cut.
const TRACE_MAX: usize = 64 << 20;

struct Log {
    start: Instant,
    /// Whether the trace has what servers log at INFO.
    verbose: bool,
    trace: String,
    /// The first error that a server logged, or the first panic.
    error: Option<String>,
}

thread_local! {
    static LOG: RefCell<Option<Log>> = const { RefCell::new(None) };
}

/// Begins the log of this thread's run. To be called inside of its runtime.
pub fn begin(verbose: bool) {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let subscriber = tracing_subscriber::registry().with(Listener);
        // Somebody else's subscriber would only mean that errors go unnoticed, and there is nobody else.
        let _first = tracing::subscriber::set_global_default(subscriber);
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if !take_error(|| panic.to_string()) {
                before(panic);
            }
        }));
    });
    LOG.set(Some(Log {
        start: Instant::now(),
        verbose,
        trace: String::new(),
        error: None,
    }));
}

/// The trace, and what went wrong by the servers' own account.
pub fn end() -> (String, Option<String>) {
    LOG.take()
        .map_or_else(Default::default, |log| (log.trace, log.error))
}

pub fn error() -> Option<String> {
    LOG.with_borrow(|log| log.as_ref().and_then(|log| log.error.clone()))
}

/// One line of the trace.
pub fn note(line: impl FnOnce() -> String) {
    with(|log| {
        if log.trace.len() < TRACE_MAX {
            let millis = Instant::now().duration_since(log.start).as_millis();
            writeln!(log.trace, "{millis:>8} {}", line()).expect("a string takes all");
        }
    });
}

/// One line of a verbose trace.
pub fn detail(line: impl FnOnce() -> String) {
    if LOG.with_borrow(|log| log.as_ref().is_some_and(|log| log.verbose)) {
        note(line);
    }
}

fn with<T>(act: impl FnOnce(&mut Log) -> T) -> Option<T> {
    LOG.with(|log| {
        // A panic may come while the log is being written.
        let mut log = log.try_borrow_mut().ok()?;
        log.as_mut().map(act)
    })
}

/// Whether this thread is a run.
fn take_error(text: impl FnOnce() -> String) -> bool {
    let text = with(|log| {
        let text = text();
        log.error.get_or_insert_with(|| text.clone());
        text
    });
    match text {
        Some(text) => {
            note(|| text);
            true
        }
        None => false,
    }
}

struct Listener;

impl<S: Subscriber> Layer<S> for Listener {
    fn enabled(&self, metadata: &Metadata<'_>, _: Context<'_, S>) -> bool {
        let level = *metadata.level();
        let wanted = with(|log| level <= Level::WARN || (log.verbose && level <= Level::INFO));
        wanted.unwrap_or(false)
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(LevelFilter::INFO)
    }

    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut text = Text(format!("{} ", event.metadata().level()));
        event.record(&mut text);
        if *event.metadata().level() == Level::ERROR {
            take_error(|| text.0);
        } else {
            note(|| text.0);
        }
    }
}

struct Text(String);

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        let written = match field.name() {
            "message" => write!(self.0, "{value:?} "),
            name => write!(self.0, "{name}={value:?} "),
        };
        written.expect("a string takes all");
    }
}
