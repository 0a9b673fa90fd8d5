//! What every engine must hold to.

mod driver;

pub use driver::*;
