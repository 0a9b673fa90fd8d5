//! What every engine must hold to.

mod driver;
mod rooms;
mod statements;

pub use driver::*;
pub use rooms::*;
pub use statements::*;
