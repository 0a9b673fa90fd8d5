//! What every engine must hold to.

mod driver;
mod history;
mod rooms;
mod statements;

pub use driver::*;
pub use history::*;
pub use rooms::*;
pub use statements::*;
