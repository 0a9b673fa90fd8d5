//! What every engine must hold to.

mod driver;
mod history;
mod numbers;
mod rooms;
mod serving;
mod statements;

pub use driver::*;
pub use history::*;
pub use numbers::*;
pub use rooms::*;
pub use serving::*;
pub use statements::*;
