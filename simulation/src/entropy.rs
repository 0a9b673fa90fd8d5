//! The randomness that the operating system gives, made a function of the seed.
//!
//! Whole servers draw chance in many places: tokens, device ids, jitter, the keys of hash tables. All of it
//! comes out of `getrandom(2)` in the end, and the standard library looks that symbol up so that a program may
//! bring its own. A thread that has a seed gets the numbers of that seed; others get those of the system.

#![expect(
    unsafe_code,
    reason = "a C symbol is given another meaning; the alternative is a seam in every crate that draws"
)]

use std::cell::RefCell;
use std::io::Read as _;

use crate::chance::Chance;

thread_local! {
    static SEEDED: RefCell<Option<Chance>> = const { RefCell::new(None) };
}

/// From here on this thread draws from the seed. To be called before the thread has drawn anything: what it
/// draws early, such as the keys of hash tables, it keeps.
pub fn seed(seed: u64) {
    SEEDED.set(Some(Chance::new(seed)));
}

#[unsafe(no_mangle)]
extern "C" fn getrandom(buffer: *mut u8, length: usize, _flags: u32) -> isize {
    if buffer.is_null() || length == 0 {
        return 0;
    }
    // SAFETY: whoever calls getrandom(2) gives a buffer of that length; zeroed, it is a valid slice.
    let bytes = unsafe {
        buffer.write_bytes(0, length);
        std::slice::from_raw_parts_mut(buffer, length)
    };
    let filled = SEEDED.with_borrow_mut(|seeded| match seeded {
        Some(chance) => {
            for chunk in bytes.chunks_mut(8) {
                chunk.copy_from_slice(&chance.draw().to_le_bytes()[..chunk.len()]);
            }
            true
        }
        None => std::fs::File::open("/dev/urandom")
            .and_then(|mut file| file.read_exact(bytes))
            .is_ok(),
    });
    match filled {
        true => isize::try_from(length).unwrap_or(isize::MAX),
        false => -1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draws(seed_of: Option<u64>) -> (u64, String) {
        let thread = std::thread::Builder::new().spawn(move || {
            if let Some(number) = seed_of {
                seed(number);
            }
            let set: std::collections::HashSet<u32> = (0..100).collect();
            let first = set.iter().next().copied().expect("not empty");
            (rand_u64(), format!("{first} {set:?}"))
        });
        let thread = thread.expect("the system has a thread");
        thread.join().expect("it ends")
    }

    fn rand_u64() -> u64 {
        use std::hash::{BuildHasher as _, RandomState};
        RandomState::new().hash_one(1)
    }

    #[test]
    fn hash_tables_of_one_seed_have_one_order() {
        assert_eq!(draws(Some(1)), draws(Some(1)));
        assert_ne!(draws(Some(1)), draws(Some(2)));
        assert_ne!(draws(None), draws(None));
    }
}
