//! A machine that only reads, decides and commits.

use std::time::Duration;

use crate::effect::{Effect, Input, Machine, Now, Tell, Ticket};
use crate::facts::{Facts, Got};
use crate::outbox::Outbox;
use crate::write::WriteSet;

/// A decision about one room, run again whenever a fact it lacked has come in.
pub(crate) trait Decide {
    type Outcome;

    fn decide(&self, facts: &mut Facts) -> Got<Decision<Self::Outcome>>;
}

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
    outcome: Option<D::Outcome>,
}

impl<D: Decide> Thinking<D> {
    /// Starts thinking at once.
    pub fn new(decider: D, facts: Facts, out: &mut Outbox) -> Self {
        let mut this = Self {
            decider,
            facts,
            committing: None,
            outcome: None,
        };
        this.think(out);
        this
    }

    fn think(&mut self, out: &mut Outbox) {
        match self.decider.decide(&mut self.facts) {
            Err(lacking) => self.facts.request(lacking, out),
            Ok(Decision::Done(outcome)) => self.outcome = Some(outcome),
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

    pub fn handle(&mut self, input: Input, out: &mut Outbox) {
        match (self.committing.take(), input) {
            (None, Input::Loaded { ticket, loaded }) => {
                if self.outcome.is_none() && self.facts.hear(ticket, loaded) {
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
