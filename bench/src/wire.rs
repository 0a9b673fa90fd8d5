//! A relay before a server's federation listener, which counts the bytes and can be as bad as a real line.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Mutex, Notify, mpsc};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, sleep_until};

const BUFFER: usize = 64 << 10;
/// Reads of one connection that are between its ends: 16 MB, which is what a gigabit and an eighth of a second hold.
const UNDERWAY_MAX: usize = 256;
/// What is wrong with the line. By default nothing.
#[derive(clap::Args, Clone, Copy, Debug, Default)]
pub struct Faults {
    /// Milliseconds that everything takes to the resident, and the same back.
    #[arg(long, default_value_t = 0)]
    delay_ms: u64,
    /// Megabits in a second that the line carries from the resident. As many as it can when left out.
    #[arg(long)]
    mbit: Option<NonZeroU32>,
    /// Cuts all connections whenever so many more megabytes have come from the resident.
    #[arg(long)]
    cut_mb: Option<NonZeroU32>,
}

impl Faults {
    /// For the conditions below a table.
    pub fn describe(&self) -> String {
        let mut text = String::new();
        if self.delay_ms > 0 {
            text += &format!("; {} ms to the resident, and as long back", self.delay_ms);
        }
        if let Some(mbit) = self.mbit {
            text += &format!("; {mbit} Mbit/s from the resident");
        }
        if let Some(mb) = self.cut_mb {
            text += &format!("; connections cut after every {mb} MB");
        }
        text
    }
}

pub struct Wire {
    line: Arc<Line>,
    task: JoinHandle<()>,
}

/// All connections together.
#[derive(Default)]
struct Line {
    faults: Faults,
    cuts: Notify,
    up: Direction,
    down: Direction,
}

#[derive(Default)]
struct Direction {
    bytes: AtomicU64,
    /// When what has been sent so far will have gone.
    free: Mutex<Option<Instant>>,
}

impl Line {
    fn delay(&self) -> Duration {
        Duration::from_millis(self.faults.delay_ms)
    }

    /// Whether the line is to be cut between these two counts of bytes from the server.
    fn cuts_between(&self, before: u64, after: u64) -> bool {
        let every = self.faults.cut_mb.map(|mb| u64::from(mb.get()) * 1_000_000);
        every.is_some_and(|every| before / every != after / every)
    }

    /// Waits until so many bytes have gone, behind those that other connections sent before.
    async fn carry(&self, way: &Direction, bytes: usize) {
        let before = way.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        if !std::ptr::eq(way, &self.down) {
            return;
        }
        if self.cuts_between(before, before + bytes as u64) {
            self.cuts.notify_waiters();
        }
        let Some(mbit) = self.faults.mbit else {
            return;
        };
        // A megabit in a second is a bit in a microsecond.
        let takes = Duration::from_micros(bytes as u64 * 8 / u64::from(mbit.get()));
        let gone = {
            let mut free = way.free.lock().await;
            let begins = free.unwrap_or_else(Instant::now).max(Instant::now());
            *free.insert(begins + takes)
        };
        sleep_until(gone).await;
    }
}

impl Wire {
    /// Passes on what comes to one port to the other one.
    pub async fn lay(from: u16, to: u16, faults: Faults) -> std::io::Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", from)).await?;
        let line = Arc::new(Line {
            faults,
            ..Line::default()
        });
        let shared = Arc::clone(&line);
        let task = tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                tokio::spawn(relay(near, to, Arc::clone(&shared)));
            }
        });
        Ok(Self { line, task })
    }

    /// Bytes so far, TLS and all: to the server and from it.
    pub fn bytes(&self) -> (u64, u64) {
        let read = |way: &Direction| way.bytes.load(Ordering::Relaxed);
        (read(&self.line.up), read(&self.line.down))
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A connection that breaks on one side ends on the other, which is all that its users need to know.
async fn relay(near: TcpStream, to: u16, line: Arc<Line>) {
    // A handshake is a way there and back.
    sleep(line.delay() * 2).await;
    let Ok(far) = TcpStream::connect(("127.0.0.1", to)).await else {
        return;
    };
    // Latency is what is measured.
    let _ = (near.set_nodelay(true), far.set_nodelay(true));
    let (near_read, near_write) = near.into_split();
    let (far_read, far_write) = far.into_split();
    let there = pump(near_read, far_write, &line, &line.up);
    let back = pump(far_read, near_write, &line, &line.down);
    tokio::select! {
        () = line.cuts.notified() => {}
        _ = async { tokio::join!(there, back) } => {}
    }
}

async fn pump(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    line: &Line,
    way: &Direction,
) -> std::io::Result<()> {
    let (sender, mut receiver) = mpsc::channel::<(Instant, Vec<u8>)>(UNDERWAY_MAX);
    let send = async move {
        let mut buffer = vec![0; BUFFER];
        loop {
            let read = from.read(&mut buffer).await?;
            if read == 0 {
                return std::io::Result::Ok(());
            }
            line.carry(way, read).await;
            let arrives = Instant::now() + line.delay();
            if sender
                .send((arrives, buffer[..read].to_vec()))
                .await
                .is_err()
            {
                return Ok(());
            }
        }
    };
    let arrive = async move {
        while let Some((arrives, bytes)) = receiver.recv().await {
            sleep_until(arrives).await;
            to.write_all(&bytes).await?;
        }
        to.shutdown().await
    };
    tokio::try_join!(send, arrive).map(drop)
}
