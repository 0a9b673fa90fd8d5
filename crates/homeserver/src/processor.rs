//! Where work goes that keeps a processor busy: signatures, password hashes, large inputs of machines.

use tokio::task::JoinError;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Processor {
    /// To threads beside the async ones.
    #[default]
    Pool,
    /// To the task that has it. For simulations, into which threads would bring chance.
    Caller,
}

impl Processor {
    /// An error is the work's panic.
    pub(crate) async fn run<T: Send + 'static>(
        self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, JoinError> {
        match self {
            Self::Pool => tokio::task::spawn_blocking(work).await,
            Self::Caller => Ok(work()),
        }
    }
}
