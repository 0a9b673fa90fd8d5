//! Which process may work on what, when several share one database.
//!
//! A lease runs out by itself. Its token grows with each new holder: a write that carries the token of an
//! earlier one is refused with [`still_held`], however late it comes.

use crate::driver::{Conn, Result};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    pub name: String,
    pub holder: String,
    pub token: i64,
    pub expires_ms: i64,
}

const GET: &str = "SELECT holder, token, expires_ms FROM leases WHERE name = $1";
const PUT: &str = "INSERT INTO leases (name, holder, token, expires_ms) VALUES ($1, $2, $3, $4)
    ON CONFLICT (name) DO UPDATE SET holder = excluded.holder, token = excluded.token,
    expires_ms = excluded.expires_ms";
const RELEASE: &str = "UPDATE leases SET expires_ms = 0 WHERE name = $1 AND token = $2";

/// Takes or renews a lease; `None` while somebody else has it.
pub fn acquire(
    c: &mut dyn Conn,
    name: &str,
    holder: &str,
    now_ms: i64,
    for_ms: i64,
) -> Result<Option<Lease>> {
    let found = c.query_opt(GET, &[&name], |row| {
        Ok((row.string(0)?, row.int(1)?, row.int(2)?))
    })?;
    let token = match found {
        None => 1,
        Some((had, token, expires)) if had == holder && expires > now_ms => token,
        Some((_, _, expires)) if expires > now_ms => return Ok(None),
        Some((_, token, _)) => token + 1,
    };
    let expires_ms = now_ms.saturating_add(for_ms);
    c.execute(PUT, &[&name, &holder, &token, &expires_ms])?;
    Ok(Some(Lease {
        name: name.to_owned(),
        holder: holder.to_owned(),
        token,
        expires_ms,
    }))
}

/// Whether nobody has taken the lease over. To be asked in the transaction that it is to protect.
pub fn still_held(c: &mut dyn Conn, lease: &Lease) -> Result<bool> {
    let found = c.query_opt(GET, &[&lease.name], |row| row.int(1))?;
    Ok(found == Some(lease.token))
}

/// Gives a lease back before its time, if it is still held.
pub fn release(c: &mut dyn Conn, lease: &Lease) -> Result<()> {
    c.execute(RELEASE, &[&lease.name, &lease.token]).map(drop)
}
