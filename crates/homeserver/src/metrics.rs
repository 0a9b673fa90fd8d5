//! What operators can watch: counters, gauges and histograms under the prefix `vestibule_`.
//!
//! They go to whatever recorder the binary installed. `docs/operating.md` says what to look at.

use std::collections::BTreeMap;
use std::time::Duration;

use metrics::{
    Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram,
};
use storage::{queues, rooms};

use crate::Homeserver;

const JOINS: &str = "vestibule_joins_total";
const JOIN_SECONDS: &str = "vestibule_join_seconds";
const FULL_SECONDS: &str = "vestibule_room_full_seconds";
const RESYNC_FAILURES: &str = "vestibule_resync_failures_total";
const JOBS: &str = "vestibule_joins_under_way";
const PARTIAL_ROOMS: &str = "vestibule_partial_rooms";
const PDUS_RECEIVED: &str = "vestibule_federation_pdus_received_total";
const TRANSACTIONS_SENT: &str = "vestibule_federation_transactions_sent_total";
const WAITING_SERVERS: &str = "vestibule_federation_waiting_servers";
const FAILING_SERVERS: &str = "vestibule_federation_failing_servers";
/// For the crate of the doors.
pub const REQUESTS: &str = "vestibule_http_requests_total";
pub const REQUEST_SECONDS: &str = "vestibule_http_request_seconds";

/// The bounds of every histogram, in seconds: from a local answer to a resync of the largest rooms.
pub const SECONDS: [f64; 14] = [
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0, 600.0,
];

/// Tells the recorder what each of them means.
pub fn describe() {
    describe_counter!(
        JOINS,
        "Remote joins that ended, by outcome: partial, full, failed"
    );
    describe_histogram!(
        JOIN_SECONDS,
        Unit::Seconds,
        "From a remote join to a usable room"
    );
    describe_histogram!(
        FULL_SECONDS,
        Unit::Seconds,
        "From a remote join to a full room"
    );
    describe_counter!(
        RESYNC_FAILURES,
        "Rounds over all servers in which none gave the state of a room"
    );
    describe_gauge!(JOBS, "Joins under way, by state");
    describe_gauge!(
        PARTIAL_ROOMS,
        "Rooms whose members are not all known so far"
    );
    describe_counter!(PDUS_RECEIVED, "PDUs of other servers, by verdict");
    describe_counter!(
        TRANSACTIONS_SENT,
        "Transactions to other servers, by outcome: ok, failed"
    );
    describe_gauge!(
        WAITING_SERVERS,
        "Servers for which something waits in the outbox"
    );
    describe_gauge!(
        FAILING_SERVERS,
        "Servers that did not take the last transaction"
    );
    describe_counter!(REQUESTS, "Requests answered, by method, route and status");
    describe_histogram!(
        REQUEST_SECONDS,
        Unit::Seconds,
        "From request to answer, by route; /sync waits on purpose"
    );
}

pub(crate) fn join_ended(outcome: &'static str, took: Duration) {
    counter!(JOINS, "outcome" => outcome).increment(1);
    if outcome != "failed" {
        histogram!(JOIN_SECONDS).record(took.as_secs_f64());
    }
}

pub(crate) fn room_became_full(took: Duration) {
    histogram!(FULL_SECONDS).record(took.as_secs_f64());
}

pub(crate) fn resync_round_failed() {
    counter!(RESYNC_FAILURES).increment(1);
}

pub(crate) fn pdu_received(verdict: &'static str) {
    counter!(PDUS_RECEIVED, "verdict" => verdict).increment(1);
}

pub(crate) fn transaction_sent(outcome: &'static str) {
    counter!(TRANSACTIONS_SENT, "outcome" => outcome).increment(1);
}

impl Homeserver {
    /// Reads what is measured when somebody looks, not when it changes.
    pub async fn measure(&self) -> storage::Result<()> {
        let (partial, waiting, failing) = self
            .store()
            .read(|c| {
                let failing = queues::destinations(c)?;
                let failing = failing.iter().filter(|(_, d)| d.failing_since_ms.is_some());
                Ok((
                    rooms::partial_rooms(c)?.len(),
                    queues::waiting_servers(c)?.len(),
                    failing.count(),
                ))
            })
            .await?;
        set(PARTIAL_ROOMS, partial);
        set(WAITING_SERVERS, waiting);
        set(FAILING_SERVERS, failing);
        let mut by_state: BTreeMap<&str, usize> = crate::jobs::STATES_UNDER_WAY
            .into_iter()
            .map(|state| (state, 0))
            .collect();
        for state in self.jobs().states() {
            if let Some(count) = by_state.get_mut(state.as_str()) {
                *count += 1;
            }
        }
        for (state, count) in by_state {
            gauge!(JOBS, "state" => state.to_owned()).set(as_gauge(count));
        }
        Ok(())
    }
}

fn set(name: &'static str, value: usize) {
    gauge!(name).set(as_gauge(value));
}

fn as_gauge(value: usize) -> f64 {
    f64::from(u32::try_from(value).unwrap_or(u32::MAX))
}
