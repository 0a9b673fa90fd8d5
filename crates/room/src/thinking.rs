//! A machine that only reads, decides and commits.

use std::time::Duration;

use crate::effect::{Effect, Input, Load, Loaded, Machine, Now, Tell, Ticket};
use crate::facts::{Facts, Got};
use crate::outbox::Outbox;
use crate::write::WriteSet;

/// A decision about one room, run again whenever a fact it lacked has come in.
pub(crate) trait Decide {
    type Outcome;

    fn decide(&self, facts: &mut Facts) -> Got<Decision<Self::Outcome>>;

    /// Whether this outcome may come from facts that were loaded before and after another commit. What is
    /// committed is guarded by the room's revision; what is refused is looked at again if that has changed.
    fn wants_proof(outcome: &Self::Outcome) -> bool;
}

/// A room that changes all the time is refused in the end.
const PROOFS_MAX: u32 = 5;

pub(crate) enum Decision<O> {
    Done(O),
    /// The outcome holds once the commit does.
    Commit {
        writes: Box<WriteSet>,
        outcome: O,
        tell: Vec<Tell>,
    },
}

pub(crate) struct Thinking<D: Decide> {
    decider: D,
    facts: Facts,
    committing: Option<(Ticket, D::Outcome, Vec<Tell>)>,
    /// The revision that this outcome was decided on is being looked up again.
    proving: Option<(Ticket, u64, D::Outcome)>,
    proofs: u32,
    outcome: Option<D::Outcome>,
}

impl<D: Decide> Thinking<D> {
    /// Starts thinking at once.
    pub fn new(decider: D, facts: Facts, out: &mut Outbox) -> Self {
        let mut this = Self {
            decider,
            facts,
            committing: None,
            proving: None,
            proofs: 0,
            outcome: None,
        };
        this.think(out);
        this
    }

    fn think(&mut self, out: &mut Outbox) {
        match self.decider.decide(&mut self.facts) {
            Err(lacking) => self.facts.request(lacking, out),
            Ok(Decision::Done(outcome)) => self.conclude(outcome, out),
            Ok(Decision::Commit {
                writes,
                outcome,
                tell,
            }) => {
                let ticket = out.commit(*writes);
                self.committing = Some((ticket, outcome, tell));
            }
        }
    }

    fn conclude(&mut self, outcome: D::Outcome, out: &mut Outbox) {
        let head = self.facts.head().ok().flatten();
        match head.filter(|_| D::wants_proof(&outcome) && self.proofs < PROOFS_MAX) {
            Some(head) => {
                self.proofs += 1;
                let ticket = out.load(&self.facts.room, Load::Head);
                self.proving = Some((ticket, head.revision, outcome));
            }
            None => self.outcome = Some(outcome),
        }
    }

    fn on_proof(&mut self, (revision, outcome): (u64, D::Outcome), head: Loaded, out: &mut Outbox) {
        match head {
            Loaded::Head(Some(head)) if head.revision != revision => {
                self.facts.forget();
                self.think(out);
            }
            _ => self.outcome = Some(outcome),
        }
    }

    pub fn handle(&mut self, input: Input, out: &mut Outbox) {
        let input = match (self.proving.take(), input) {
            (Some((t, revision, outcome)), Input::Loaded { ticket, loaded }) if t == ticket => {
                return self.on_proof((revision, outcome), loaded, out);
            }
            (proving, input) => {
                self.proving = proving;
                input
            }
        };
        match (self.committing.take(), input) {
            (None, Input::Answered { ticket, answer, .. }) => {
                if self.facts.hear_answer(ticket, answer) {
                    self.think(out);
                }
            }
            (None, Input::Loaded { ticket, loaded }) => {
                let open = self.outcome.is_none() && self.proving.is_none();
                if open && self.facts.hear(ticket, loaded) {
                    self.think(out);
                }
            }
            (
                Some((t, outcome, tell)),
                Input::Committed {
                    ticket,
                    outcome: done,
                },
            ) if t == ticket => match done {
                Ok(()) => {
                    tell.into_iter().for_each(|tell| out.tell(tell));
                    self.outcome = Some(outcome);
                }
                Err(_) => {
                    self.facts.forget();
                    self.think(out);
                }
            },
            (committing, _late_or_double) => self.committing = committing,
        }
    }

    pub fn take_outcome(&mut self) -> Option<D::Outcome> {
        self.outcome.take()
    }
}

/// [`Thinking`] as a machine of its own.
pub(crate) struct Thinker<D: Decide> {
    thinking: Thinking<D>,
    out: Outbox,
}

impl<D: Decide> Thinker<D> {
    pub fn new(decider: D, facts: Facts) -> Self {
        let mut out = Outbox::default();
        Self {
            thinking: Thinking::new(decider, facts, &mut out),
            out,
        }
    }
}

impl<D: Decide> Machine for Thinker<D> {
    type Outcome = D::Outcome;

    fn handle(&mut self, input: Input, _: Now) {
        self.thinking.handle(input, &mut self.out);
    }

    fn poll_effect(&mut self) -> Option<Effect> {
        self.out.next()
    }

    fn deadline(&self) -> Option<Duration> {
        None
    }

    fn poll_outcome(&mut self) -> Option<Self::Outcome> {
        self.thinking.take_outcome()
    }
}
