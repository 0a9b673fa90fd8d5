//! What the machines of a room read and write.

use std::collections::BTreeSet;
use std::sync::Arc;

use protocol::build::PduDraft;
use protocol::id::{EventId, RoomId, ServerName, UserId};
use protocol::nid::{EventNid, KeyNid};
use protocol::pdu::Pdu;
use protocol::room_version::RoomVersion;
use protocol::signature::SigningKey;
use protocol::state::StateMap;
use protocol::state_resolution::in_question;
use room::effect::{Extremity, Head, Load, Loaded, PartialMarker, Place, Stale};
use room::write::{
    EventState, FanOut, Former, IntentChange, NewEvent, OutOfBand, PartialChange, Rejudged,
    Transaction, Verdict, WriteSet,
};
use serde_json::{Value, json};
use storage::apply::{Applied, apply};
use storage::driver::Conn;
use storage::load::load;
use storage::{Store, events, out_of_band, queues, rooms, states};

use crate::engines::Database;

const VERSION: RoomVersion = RoomVersion::V11;

pub(crate) fn user(name: &str) -> UserId {
    UserId::parse(name).unwrap()
}

pub(crate) fn server(name: &str) -> ServerName {
    ServerName::parse(name).unwrap()
}

/// A room under construction: knows what it stored, so that the next event can be made.
pub(crate) struct Fixture {
    pub store: Store,
    pub room: RoomId,
    pub state: StateMap,
    pub tips: Vec<Extremity>,
    pub revision: u64,
    depth: i64,
    key: SigningKey,
}

/// An event with its numbers.
#[derive(Clone)]
pub(crate) struct Made {
    pub nid: EventNid,
    pub key: Option<KeyNid>,
    pub pdu: Arc<Pdu>,
}

impl Fixture {
    pub async fn new(database: &Database) -> Self {
        Self {
            store: database.open().await,
            room: RoomId::parse("!room:localhost").unwrap(),
            state: StateMap::new(),
            tips: Vec::new(),
            revision: 0,
            depth: 0,
            key: SigningKey::generate([7; 32], "1").unwrap(),
        }
    }

    /// `@alice:localhost` has made the room and is in it.
    pub async fn joined(database: &Database) -> Self {
        let mut fixture = Self::new(database).await;
        fixture
            .say(
                "@alice:localhost",
                "m.room.create",
                Some(""),
                json!({"room_version": "11"}),
            )
            .await;
        fixture.join("@alice:localhost").await;
        fixture
    }

    pub fn draft(
        &self,
        sender: &str,
        kind: &str,
        state_key: Option<&str>,
        content: Value,
        prev: &[EventId],
        auth: &[EventId],
        depth: i64,
    ) -> Arc<Pdu> {
        let sender = user(sender);
        let draft = PduDraft {
            room_id: Some(self.room.clone()),
            sender: sender.clone(),
            kind: kind.to_owned(),
            state_key: state_key.map(str::to_owned),
            content,
            prev_events: prev.iter().cloned().map(Into::into).collect(),
            auth_events: auth.iter().cloned().map(Into::into).collect(),
            depth,
            origin_server_ts: 1_700_000_000_000 + depth,
            redacts: None,
            extra: serde_json::Map::new(),
        };
        Arc::new(
            draft
                .sign(&self.key, &sender.server_name(), VERSION)
                .unwrap(),
        )
    }

    pub async fn intern(&self, pdus: &[Arc<Pdu>]) -> Vec<Made> {
        self.number(pdus, false).await
    }

    pub async fn number(&self, pdus: &[Arc<Pdu>], new: bool) -> Vec<Made> {
        let ids = pdus.iter().map(|pdu| pdu.event_id.clone()).collect();
        let keys: Vec<_> = pdus
            .iter()
            .filter_map(|pdu| Some((pdu.kind.clone(), pdu.state_key.clone()?)))
            .collect();
        let load_keys = Load::Intern {
            version: VERSION,
            ids,
            keys,
            new,
        };
        let loaded = load(&self.store, &self.room, load_keys).await.unwrap();
        let Loaded::Interned { events, keys } = loaded else {
            panic!("not what was asked for");
        };
        let mut keys = keys.into_iter();
        pdus.iter()
            .zip(events)
            .map(|(pdu, nid)| Made {
                nid,
                key: pdu.state_key.as_ref().and_then(|_| keys.next()),
                pdu: Arc::clone(pdu),
            })
            .collect()
    }

    /// An event upon the forward extremities, and the state after it.
    pub async fn make(
        &mut self,
        sender: &str,
        kind: &str,
        state_key: Option<&str>,
        content: Value,
    ) -> (Made, EventState) {
        self.depth += 1;
        let prev: Vec<EventId> = self.tips.iter().map(|tip| tip.event_id.clone()).collect();
        let auth: Vec<EventNid> = self.state.iter().map(|(_, nid)| nid).take(3).collect();
        let auth = self
            .store
            .read(move |c| events::ids(c, &auth))
            .await
            .unwrap();
        let auth: Vec<EventId> = auth.into_values().collect();
        let pdu = self.draft(sender, kind, state_key, content, &prev, &auth, self.depth);
        let made = self.intern(&[pdu]).await.remove(0);
        let before = self.state.clone();
        let mut after = before.clone();
        if let Some(key) = made.key {
            after.insert(key, made.nid);
        }
        let state = EventState {
            before,
            after,
            partial: false,
        };
        (made, state)
    }

    pub fn writes(&self) -> WriteSet {
        let mut writes = WriteSet::new(self.room.clone(), VERSION);
        writes.expect = Some(self.revision);
        writes
    }

    /// A write set that appends this event.
    pub fn appending(&self, made: &Made, state: EventState) -> WriteSet {
        let mut writes = self.writes();
        writes.forward_extremities = Some(vec![tip(made, state.partial)]);
        writes.current_state = Some(state.after.clone());
        writes.events.push(placed(made, state));
        writes
    }

    pub async fn commit(&mut self, writes: WriteSet) -> Result<Applied, Stale> {
        let (state, tips) = (
            writes.current_state.clone(),
            writes.forward_extremities.clone(),
        );
        let applied = apply(&self.store, writes).await.unwrap()?;
        self.revision = applied.revision;
        self.state = state.unwrap_or_else(|| self.state.clone());
        self.tips = tips.unwrap_or_else(|| self.tips.clone());
        Ok(applied)
    }

    pub async fn say(
        &mut self,
        sender: &str,
        kind: &str,
        state_key: Option<&str>,
        content: Value,
    ) -> (Made, Applied) {
        let (made, state) = self.make(sender, kind, state_key, content).await;
        let writes = self.appending(&made, state);
        let applied = self.commit(writes).await.unwrap();
        (made, applied)
    }

    pub async fn join(&mut self, who: &str) -> (Made, Applied) {
        let content = json!({"membership": "join"});
        self.say(who, "m.room.member", Some(who), content).await
    }

    pub async fn load(&self, question: Load) -> Loaded {
        load(&self.store, &self.room, question).await.unwrap()
    }

    pub async fn head(&self) -> Head {
        let Loaded::Head(Some(head)) = self.load(Load::Head).await else {
            panic!("the room is not known");
        };
        *head
    }

    pub fn marker(&self, join: &Made) -> PartialMarker {
        PartialMarker {
            servers_in_room: vec![server("b.org"), server("a.org")],
            joined_via: server("b.org"),
            join_event: join.pdu.event_id.clone(),
            device_lists_at: 0,
        }
    }
}

pub(crate) fn tip(made: &Made, partial: bool) -> Extremity {
    Extremity {
        nid: made.nid,
        event_id: made.pdu.event_id.clone(),
        depth: made.pdu.depth,
        partial,
    }
}

pub(crate) fn placed(made: &Made, state: EventState) -> NewEvent {
    NewEvent {
        nid: made.nid,
        pdu: Arc::clone(&made.pdu),
        key: made.key,
        place: Place::Timeline,
        state: Some(state),
        verdict: Verdict::Accepted,
        fan_out: FanOut::Nobody,
        transaction: None,
    }
}

pub(crate) fn outlier(made: &Made) -> NewEvent {
    NewEvent {
        place: Place::Outlier,
        state: None,
        ..placed(
            made,
            EventState {
                before: StateMap::new(),
                after: StateMap::new(),
                partial: false,
            },
        )
    }
}

pub async fn a_room_reads_back_as_it_was_written(database: &Database) {
    let mut fixture = Fixture::new(database).await;
    assert!(matches!(fixture.load(Load::Head).await, Loaded::Head(None)));
    fixture
        .say("@alice:localhost", "m.room.create", Some(""), json!({}))
        .await;
    let (join, applied) = fixture.join("@alice:localhost").await;
    let change = &applied.memberships[0];
    assert!(change.local && change.before.is_none() && !change.revealed);
    assert_eq!(change.after.as_deref(), Some("join"));
    let (bob, applied) = fixture.join("@bob:b.org").await;
    assert_eq!((applied.events[0].position, applied.revision), (3, 3));
    let head = fixture.head().await;
    assert_eq!(
        (head.version, head.revision, head.min_depth),
        (VERSION, 3, 1)
    );
    assert_eq!(head.forward_extremities, [tip(&bob, false)]);
    assert_eq!(head.state, fixture.state);
    assert_eq!(head.local_joined, [user("@alice:localhost")]);
    assert!(head.partial.is_none() && !head.handshake_running);
    let Loaded::Hosts(hosts) = fixture.load(Load::Hosts).await else {
        panic!()
    };
    assert_eq!(hosts, [server("b.org")]);
    let find = Load::Find {
        ids: vec![
            join.pdu.event_id.clone(),
            EventId::parse("$nothing").unwrap(),
        ],
    };
    // With cold caches too.
    let again = if database.lasting {
        database.open().await
    } else {
        fixture.store.clone()
    };
    let Loaded::Found(found) = load(&again, &fixture.room, find).await.unwrap() else {
        panic!()
    };
    assert_eq!(found.len(), 1);
    assert_eq!(*found[&join.pdu.event_id].pdu, *join.pdu);
    assert_eq!(found[&join.pdu.event_id].known.key, join.key);
    let Loaded::Head(Some(cold)) = load(&again, &fixture.room, Load::Head).await.unwrap() else {
        panic!()
    };
    assert_eq!(cold.state, fixture.state);
}

pub async fn a_stale_write_set_writes_nothing(database: &Database) {
    let mut fixture = Fixture::joined(database).await;
    let (made, state) = fixture
        .make(
            "@alice:localhost",
            "m.room.message",
            None,
            json!({"body": "hi"}),
        )
        .await;
    let mut stale = fixture.appending(&made, state.clone());
    stale.expect = Some(1);
    assert_eq!(fixture.commit(stale).await, Err(Stale));
    let mut unknown = fixture.appending(&made, state.clone());
    unknown.expect = Some(0);
    assert_eq!(fixture.commit(unknown).await, Err(Stale));
    let ids = vec![made.pdu.event_id.clone()];
    let Loaded::Known(known) = fixture.load(Load::Known { ids: ids.clone() }).await else {
        panic!()
    };
    assert!(known.is_empty());
    assert_eq!(fixture.head().await.revision, 2);
    let writes = fixture.appending(&made, state);
    let applied = fixture.commit(writes).await.unwrap();
    assert_eq!(
        applied.events[0].position, 3,
        "the stale ones used up no position"
    );
    let Loaded::Known(known) = fixture.load(Load::Known { ids }).await else {
        panic!()
    };
    assert_eq!(known[&made.pdu.event_id].place, Place::Timeline);
}

/// Roughly, but little is little and nothing nothing.
pub async fn how_much_of_a_state_is_stored_is_known(database: &Database) {
    let mut fixture = Fixture::joined(database).await;
    let Loaded::StateStored(before) = fixture.load(Load::StateStored).await else {
        panic!()
    };
    assert!((1..10).contains(&before), "{before}");
    for n in 0..40 {
        let (made, state) = fixture
            .make("@alice:localhost", "a.b", Some(&n.to_string()), json!({}))
            .await;
        let writes = fixture.appending(&made, state);
        fixture.commit(writes).await.unwrap();
    }
    let Loaded::StateStored(after) = fixture.load(Load::StateStored).await else {
        panic!()
    };
    assert!((20..80).contains(&(after - before)), "{before}, {after}");
}

pub async fn states_are_kept_at_every_event(database: &Database) {
    let mut fixture = Fixture::joined(database).await;
    let mut topics = Vec::new();
    for n in 0..40 {
        let content = json!({"topic": n.to_string()});
        let (made, _) = fixture
            .say("@alice:localhost", "m.room.topic", Some(""), content)
            .await;
        topics.push((made, fixture.state.clone()));
    }
    let store = if database.lasting {
        database.open().await
    } else {
        fixture.store.clone()
    };
    let events = topics.iter().map(|(made, _)| made.nid).collect();
    let question = Load::States { events };
    let Loaded::States(found) = load(&store, &fixture.room, question).await.unwrap() else {
        panic!()
    };
    for pair in topics.windows(2) {
        let [(_, before), (made, after)] = pair else {
            panic!()
        };
        assert_eq!(found[&made.nid].before, *before);
        assert_eq!(found[&made.nid].after, *after);
    }
    let question = Load::StateEvents {
        state: topics[5].1.clone(),
        keys: vec![
            ("m.room.topic".into(), "".into()),
            ("m.room.name".into(), "".into()),
        ],
    };
    let Loaded::StateEvents(found) = load(&store, &fixture.room, question).await.unwrap() else {
        panic!()
    };
    assert_eq!(found.len(), 1);
    assert_eq!(
        found[&("m.room.topic".into(), "".into())].0,
        topics[5].0.nid
    );
    // The state of the room as it stood at a position of the stream.
    let row = store
        .read(move |c| rooms::by_id(c, &RoomId::parse("!room:localhost").unwrap()))
        .await
        .unwrap()
        .unwrap();
    let changed = store
        .read(move |c| states::changes(c, row.nid, 5, 10))
        .await
        .unwrap();
    assert_eq!(changed.len(), 1);
    assert_eq!(
        changed[0].1,
        Some(topics[2].0.nid),
        "position 5 is the third topic"
    );
    assert_eq!(changed[0].2, Some(topics[7].0.nid));
}

pub async fn a_state_change_in_a_big_room_costs_little(database: &Database) {
    let mut fixture = Fixture::joined(database).await;
    // Numbers that no event has: the trie does not care.
    let mut state = fixture.state.clone();
    for n in 0..100_000_u32 {
        state.insert(KeyNid(n + 10), EventNid(1_000_000 + i64::from(n) * 3));
    }
    let (made, mut at) = fixture
        .make("@alice:localhost", "m.room.message", None, json!({}))
        .await;
    at.after = state.clone();
    at.before = state.clone();
    let mut writes = fixture.writes();
    writes.events.push(placed(&made, at.clone()));
    fixture.commit(writes).await.unwrap();
    let bytes = "SELECT CAST(SUM(LENGTH(node)) AS BIGINT) FROM state_nodes";
    let size = |store: Store| async move {
        store
            .read(move |c| c.query_one(bytes, &[], |row| row.int(0)))
            .await
            .unwrap()
    };
    let before = size(fixture.store.clone()).await;
    let (made, mut at_next) = fixture
        .make("@alice:localhost", "m.room.message", None, json!({"n": 1}))
        .await;
    at_next.before = state.clone();
    state.insert(KeyNid(54_321), EventNid(9_999_999));
    at_next.after = state.clone();
    let mut writes = fixture.writes();
    writes.events.push(placed(&made, at_next));
    fixture.commit(writes).await.unwrap();
    let after = size(fixture.store.clone()).await;
    assert!(
        after > before && after - before < 2048,
        "{} bytes",
        after - before
    );
    let Loaded::States(found) = fixture
        .load(Load::States {
            events: vec![made.nid],
        })
        .await
    else {
        panic!()
    };
    assert_eq!(found[&made.nid].after, state);
}

pub async fn an_outlier_can_be_given_a_place_once(database: &Database) {
    let mut fixture = Fixture::joined(database).await;
    let (made, state) = fixture
        .make(
            "@alice:localhost",
            "m.room.name",
            Some(""),
            json!({"name": "n"}),
        )
        .await;
    let mut writes = WriteSet::new(fixture.room.clone(), VERSION);
    writes.events.push(outlier(&made));
    let applied = fixture.commit(writes.clone()).await.unwrap();
    assert!(applied.events.is_empty());
    assert_eq!(fixture.revision, 2, "an outlier does not change the room");
    let ids = vec![made.pdu.event_id.clone()];
    let place = async |fixture: &Fixture| {
        let Loaded::Known(known) = fixture.load(Load::Known { ids: ids.clone() }).await else {
            panic!()
        };
        known[&ids[0]].place
    };
    assert_eq!(place(&fixture).await, Place::Outlier);
    let append = fixture.appending(&made, state);
    let applied = fixture.commit(append.clone()).await.unwrap();
    assert_eq!(applied.events.len(), 1);
    assert_eq!(place(&fixture).await, Place::Timeline);
    // As an outlier again, or in the timeline again: it stays what it is.
    fixture.commit(writes).await.unwrap();
    let mut again = append;
    again.expect = None;
    assert!(fixture.commit(again).await.unwrap().events.is_empty());
    assert_eq!(place(&fixture).await, Place::Timeline);
}

/// J-54: one server's template may name a wrong version, and the next join goes by another's.
pub async fn a_room_has_the_version_that_its_state_came_with(database: &Database) {
    let mut fixture = Fixture::new(database).await;
    let room = fixture.room.clone();
    let version = async |fixture: &Fixture| {
        let room = fixture.room.clone();
        let read = move |c: &mut dyn Conn| rooms::by_id(c, &room);
        let row = fixture.store.read(read).await.unwrap();
        row.expect("something was written").version
    };
    let lie = WriteSet::new(room, RoomVersion::V2);
    fixture.commit(lie.clone()).await.unwrap();
    assert_eq!(version(&fixture).await, RoomVersion::V2);
    let content = json!({"room_version": "11"});
    fixture
        .say("@alice:localhost", "m.room.create", Some(""), content)
        .await;
    assert_eq!(version(&fixture).await, VERSION);
    fixture.commit(lie).await.unwrap();
    assert_eq!(version(&fixture).await, VERSION);
}

pub async fn a_whole_copy_takes_the_place_of_a_redacted_one(database: &Database) {
    let mut fixture = Fixture::joined(database).await;
    let (made, state) = fixture
        .make(
            "@alice:localhost",
            "m.room.message",
            None,
            json!({"body": "hi"}),
        )
        .await;
    let tampered = made.pdu.json.replace("\"hi\"", "\"ho\"");
    let redacted = Arc::new(Pdu::parse(&tampered, VERSION).unwrap());
    assert!(redacted.redacted && redacted.event_id == made.pdu.event_id);
    let mut writes = WriteSet::new(fixture.room.clone(), VERSION);
    let mut copy = outlier(&made);
    copy.pdu = Arc::clone(&redacted);
    writes.events.push(copy);
    fixture.commit(writes).await.unwrap();
    let find = Load::Find {
        ids: vec![made.pdu.event_id.clone()],
    };
    let found = async |fixture: &Fixture| {
        let Loaded::Found(found) = fixture.load(find.clone()).await else {
            panic!()
        };
        found[&made.pdu.event_id].pdu.clone()
    };
    assert_eq!(found(&fixture).await, redacted);
    let writes = fixture.appending(&made, state);
    fixture.commit(writes).await.unwrap();
    assert_eq!(found(&fixture).await, made.pdu);
}

/// A room joined with partial state: outliers, the join upon an unknown prev event, the marker.
async fn partial_room(database: &Database) -> (Fixture, Made, Made) {
    let mut fixture = Fixture::new(database).await;
    let create = fixture.draft(
        "@bob:b.org",
        "m.room.create",
        Some(""),
        json!({}),
        &[],
        &[],
        1,
    );
    let create_id = create.event_id.clone();
    let bob = json!({"membership": "join"});
    let bob = fixture.draft(
        "@bob:b.org",
        "m.room.member",
        Some("@bob:b.org"),
        bob,
        std::slice::from_ref(&create_id),
        std::slice::from_ref(&create_id),
        2,
    );
    let content = json!({"membership": "join"});
    let join = fixture.draft(
        "@alice:localhost",
        "m.room.member",
        Some("@alice:localhost"),
        content,
        &[EventId::parse("$unseen").unwrap()],
        std::slice::from_ref(&create_id),
        50,
    );
    let made = fixture.intern(&[create, bob, join]).await;
    let [create, bob, join] = <[Made; 3]>::try_from(made).unwrap_or_else(|_| panic!());
    let before: StateMap = [(create.key.unwrap(), create.nid)].into_iter().collect();
    let mut after = before.clone();
    after.insert(join.key.unwrap(), join.nid);
    let mut writes = fixture.writes();
    writes.events.push(outlier(&create));
    writes.events.push(outlier(&bob));
    let state = EventState {
        before,
        after: after.clone(),
        partial: true,
    };
    writes.events.push(placed(&join, state));
    writes.forward_extremities = Some(vec![tip(&join, true)]);
    writes.current_state = Some(after);
    writes.partial = PartialChange::Mark(fixture.marker(&join));
    fixture.commit(writes).await.unwrap();
    (fixture, bob, join)
}

pub async fn a_partial_room_becomes_full(database: &Database) {
    let (mut fixture, bob, join) = partial_room(database).await;
    let head = fixture.head().await;
    assert_eq!(head.partial, Some(fixture.marker(&join)));
    assert!(head.forward_extremities[0].partial);
    let Loaded::Ready(ready) = fixture.load(Load::ReadyPartial { limit: 10 }).await else {
        panic!()
    };
    assert_eq!(ready.len(), 1);
    assert_eq!((ready[0].nid, ready[0].key), (join.nid, join.key));
    assert_eq!(ready[0].unknown_prevs, [EventId::parse("$unseen").unwrap()]);
    assert!(ready[0].known_prevs.is_empty());
    let Loaded::BackwardExtremities(missing) = fixture.load(Load::BackwardExtremities).await else {
        panic!()
    };
    assert_eq!(missing, [(EventId::parse("$unseen").unwrap(), 49)]);
    // Not yet: the join is still partial (S-11).
    let mut early = fixture.writes();
    early.partial = PartialChange::Clear;
    assert_eq!(fixture.commit(early).await, Err(Stale));
    let mut full = fixture.state.clone();
    full.insert(bob.key.unwrap(), bob.nid);
    let mut before = full.clone();
    before.remove(join.key.unwrap());
    let mut again = fixture.writes();
    again.rejudged.push(Rejudged {
        nid: join.nid,
        event_id: join.pdu.event_id.clone(),
        key: join.key,
        state: EventState {
            before,
            after: full.clone(),
            partial: false,
        },
        verdict: Verdict::Accepted,
    });
    fixture.commit(again).await.unwrap();
    // Nor while a handshake runs (S-12a).
    let mut intending = fixture.writes();
    intending.intent = Some(IntentChange::Intend {
        job: 1,
        user: user("@carol:localhost"),
        event_id: join.pdu.event_id.clone(),
        event: "{}".into(),
        via: server("b.org"),
        omit_members: true,
    });
    fixture.commit(intending).await.unwrap();
    assert!(fixture.head().await.handshake_running);
    let mut last = fixture.writes();
    last.partial = PartialChange::Clear;
    last.current_state = Some(full.clone());
    assert_eq!(fixture.commit(last.clone()).await, Err(Stale));
    let mut forgetting = fixture.writes();
    forgetting.intent = Some(IntentChange::Forget { job: 1 });
    fixture.commit(forgetting).await.unwrap();
    let applied = fixture.commit(last).await.unwrap();
    assert_eq!(applied.became_full, Some(1));
    assert_eq!(applied.memberships.len(), 1);
    assert!(applied.memberships[0].revealed, "bob was there before us");
    let head = fixture.head().await;
    assert!(head.partial.is_none());
    assert_eq!(head.state, full);
    let stream = fixture
        .store
        .read(|c| rooms::became_full(c, 0, 1))
        .await
        .unwrap();
    assert_eq!(stream.len(), 1);
    let Loaded::Hosts(hosts) = fixture.load(Load::Hosts).await else {
        panic!()
    };
    assert_eq!(hosts, [server("b.org")]);
    // S-37: full it is, full it stays.
    let mut marking = fixture.writes();
    marking.partial = PartialChange::Mark(fixture.marker(&join));
    assert_eq!(fixture.commit(marking).await, Err(Stale));
}

pub async fn a_second_marker_changes_nothing_and_a_freed_room_has_none(database: &Database) {
    let (mut fixture, _, join) = partial_room(database).await;
    let mut other = fixture.marker(&join);
    other.joined_via = server("c.org");
    let mut again = fixture.writes();
    again.partial = PartialChange::Mark(other);
    fixture.commit(again).await.unwrap();
    assert_eq!(fixture.head().await.partial, Some(fixture.marker(&join)));
    let mut freeing = fixture.writes();
    freeing.partial = PartialChange::Free;
    let applied = fixture.commit(freeing).await.unwrap();
    assert_eq!(applied.became_full, None);
    let head = fixture.head().await;
    assert!(head.partial.is_none() && head.forward_extremities.is_empty());
}

/// S-29: what was judged on partial state is no ground to stand on after the room was given up.
pub async fn what_was_partial_in_a_freed_room_is_not_trusted(database: &Database) {
    let (mut fixture, _, join) = partial_room(database).await;
    let say = json!({"body": "words"});
    let (word, mut state) = fixture
        .make("@alice:localhost", "m.room.message", None, say.clone())
        .await;
    state.partial = true;
    let writes = fixture.appending(&word, state.clone());
    let position = fixture.commit(writes).await.unwrap().events[0].position;
    // Rejected, for want of a member that the partial state lacks.
    let topic = json!({"topic": "b"});
    let (bad, _) = fixture
        .make("@bob:b.org", "m.room.topic", Some(""), topic)
        .await;
    state.before = state.after.clone();
    let mut writes = fixture.writes();
    let mut rejected = placed(&bad, state.clone());
    rejected.verdict = Verdict::Rejected("the sender is not in the room".to_owned());
    writes.events.push(rejected);
    fixture.commit(writes).await.unwrap();
    // Full (P-5), but it was judged by the join, which may not stand.
    let (full, _) = fixture
        .make("@alice:localhost", "m.room.message", None, say)
        .await;
    let full_state = EventState {
        partial: false,
        ..state.clone()
    };
    let mut writes = fixture.writes();
    writes.events.push(placed(&full, full_state.clone()));
    fixture.commit(writes).await.unwrap();
    let mut freeing = fixture.writes();
    freeing.partial = PartialChange::Free;
    fixture.commit(freeing).await.unwrap();

    let all = [&join, &word, &bad, &full];
    let known = async |fixture: &Fixture| {
        let ids = all.iter().map(|made| made.pdu.event_id.clone()).collect();
        let Loaded::Known(known) = fixture.load(Load::Known { ids }).await else {
            panic!()
        };
        known
    };
    let seen = known(&fixture).await;
    assert!(!seen.contains_key(&bad.pdu.event_id));
    assert_eq!(seen.len(), 3);
    for event in seen.values() {
        assert!(event.place == Place::Outlier && !event.rejected && !event.partial);
    }
    let events: Vec<_> = all.iter().map(|made| made.nid).collect();
    let states = Load::States {
        events: events.clone(),
    };
    assert!(matches!(fixture.load(states).await, Loaded::States(states) if states.is_empty()));
    let children = Load::Children { events };
    assert!(matches!(fixture.load(children).await, Loaded::Children(found) if found.is_empty()));
    let ready = Load::ReadyPartial { limit: 10 };
    assert!(matches!(fixture.load(ready).await, Loaded::Ready(ready) if ready.is_empty()));
    // P-2: none comes after that.
    let mut late = fixture.writes();
    late.events.push(placed(&word, state.clone()));
    assert_eq!(fixture.commit(late).await, Err(Stale));

    // As an outlier it is judged by its auth events alone.
    let mut writes = fixture.writes();
    writes.events.push(outlier(&bad));
    writes.events.push(outlier(&word));
    fixture.commit(writes).await.unwrap();
    let event = known(&fixture).await[&bad.pdu.event_id];
    assert!(event.place == Place::Outlier && !event.rejected);
    // Given a place again it stands where it stood, and is not news.
    let mut writes = fixture.writes();
    writes.events.push(placed(&word, full_state.clone()));
    writes.events.push(placed(&bad, full_state));
    let applied = fixture.commit(writes).await.unwrap();
    assert_eq!(applied.events.len(), 1);
    assert_eq!(applied.events[0].nid, bad.nid);
    assert!(applied.events[0].position > position);
    let nid = word.nid;
    let status = fixture
        .store
        .read(move |c| Ok(events::statuses(c, &[nid])?.remove(&nid)))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(status.place, Place::Timeline);
    assert_eq!(status.position, Some(position));
}

pub async fn a_verdict_can_change(database: &Database) {
    let mut fixture = Fixture::joined(database).await;
    let (made, state) = fixture
        .make(
            "@alice:localhost",
            "m.room.message",
            None,
            json!({"body": "words"}),
        )
        .await;
    let mut writes = fixture.writes();
    let mut event = placed(&made, state.clone());
    event.verdict = Verdict::Rejected("no".to_owned());
    writes.events.push(event);
    fixture.commit(writes).await.unwrap();
    let ids = vec![made.pdu.event_id.clone()];
    let rejected = async |fixture: &Fixture| {
        let Loaded::Known(known) = fixture.load(Load::Known { ids: ids.clone() }).await else {
            panic!()
        };
        known[&ids[0]].rejected
    };
    assert!(rejected(&fixture).await);
    for (verdict, expected) in [
        (Verdict::Accepted, false),
        (Verdict::Rejected("again".to_owned()), true),
    ] {
        let mut writes = fixture.writes();
        writes.rejudged.push(Rejudged {
            nid: made.nid,
            event_id: made.pdu.event_id.clone(),
            key: None,
            state: state.clone(),
            verdict,
        });
        fixture.commit(writes).await.unwrap();
        assert_eq!(rejected(&fixture).await, expected);
    }
}

pub async fn a_closure_has_what_a_resolution_needs(database: &Database) {
    let mut fixture = Fixture::joined(database).await;
    fixture.join("@bob:b.org").await;
    let base = fixture.state.clone();
    let (one, left) = fixture
        .make(
            "@alice:localhost",
            "m.room.topic",
            Some(""),
            json!({"topic": "1"}),
        )
        .await;
    let (two, right) = fixture
        .make(
            "@alice:localhost",
            "m.room.topic",
            Some(""),
            json!({"topic": "2"}),
        )
        .await;
    let mut writes = fixture.writes();
    writes.events.push(placed(&one, left.clone()));
    writes.events.push(placed(&two, right.clone()));
    writes.forward_extremities = Some(vec![tip(&one, false), tip(&two, false)]);
    fixture.commit(writes).await.unwrap();
    assert_eq!(fixture.head().await.forward_extremities.len(), 2);
    let question = Load::Closure {
        maps: vec![left.after.clone(), right.after.clone()],
        also: Vec::new(),
    };
    let Loaded::Closure(set) = fixture.load(question).await else {
        panic!()
    };
    for made in [&one, &two] {
        assert!(set.events.contains_key(&made.nid));
        assert_eq!(set.key_of(made.nid), made.key);
        for auth in &set.events[&made.nid].auth_events {
            assert!(set.events.contains_key(auth));
            // All that they stand on is in the chains of what both sides agree on, save the newest.
            let top = base.iter().any(|(_, nid)| nid == *auth);
            assert!(top || set.shared.contains(auth));
        }
    }
    assert!(!set.shared.contains(&one.nid) && !set.shared.contains(&two.nid));
    let Loaded::Children(children) = fixture
        .load(Load::Children {
            events: fixture
                .tips
                .iter()
                .map(|t| t.nid)
                .chain([one.nid])
                .collect(),
        })
        .await
    else {
        panic!()
    };
    assert!(children.is_empty(), "the tips have no children");
    let auth = set.events[&one.nid].auth_events[0];
    let Loaded::Ready(dependents) = fixture
        .load(Load::AuthDependents { events: vec![auth] })
        .await
    else {
        panic!()
    };
    assert!(dependents.iter().any(|event| event.nid == one.nid));
}

/// Both ways to the same answer: up from an event, as the store goes, and down from every entry of a state.
pub async fn what_agreed_entries_stand_on_is_found_from_below(database: &Database) {
    let mut fixture = Fixture::joined(database).await;
    let graph = auth_graph(&mut fixture).await;
    check_shared(&fixture, &graph).await;
    if !database.lasting {
        return;
    }
    // A database that had its events before it had the table.
    let forget = |c: &mut dyn Conn| {
        for table in ["auth_above", "state_log", "fan_outs"] {
            c.execute(&format!("DROP TABLE {table}"), &[])?;
        }
        c.execute("DROP INDEX memberships_invited", &[])?;
        for column in ["attempts", "not_before_ms"] {
            c.execute(
                &format!("ALTER TABLE staged_pdus DROP COLUMN {column}"),
                &[],
            )?;
        }
        c.execute("DELETE FROM migrations WHERE number >= 5", &[])
    };
    fixture.store.write(forget).await.unwrap();
    fixture.store = database.open().await;
    check_shared(&fixture, &graph).await;
}

const GRAPH_EVENTS: usize = 240;
/// So that a state has newer and older events.
const GRAPH_KEYS: usize = 40;

/// State events of which each names some before it, stored in commits of several sizes and in both places.
async fn auth_graph(fixture: &mut Fixture) -> Vec<Made> {
    let mut graph: Vec<Made> = Vec::new();
    let mut dice = Dice(11);
    while graph.len() < GRAPH_EVENTS {
        let known = graph.len();
        let drafts: Vec<Arc<Pdu>> = (known..known + 1 + dice.below(12))
            .map(|n| {
                let mut named: Vec<EventId> = (0..known.min(1 + dice.below(3)))
                    .map(|_| {
                        let near = dice.below(known.min(30));
                        let far = dice.below(known);
                        let place = if dice.below(3) > 0 {
                            known - 1 - near
                        } else {
                            far
                        };
                        graph[place].pdu.event_id.clone()
                    })
                    .collect();
                named.dedup();
                let key = format!("{}", n % GRAPH_KEYS);
                let prev = &fixture.tips[0].event_id;
                let prev = std::slice::from_ref(prev);
                let alice = "@alice:localhost";
                fixture.draft(
                    alice,
                    "m.custom",
                    Some(&key),
                    json!({"n": n}),
                    prev,
                    &named,
                    9,
                )
            })
            .collect();
        let made = fixture.intern(&drafts).await;
        let mut writes = WriteSet::new(fixture.room.clone(), VERSION);
        for event in &made {
            let nowhere = EventState {
                before: StateMap::new(),
                after: StateMap::new(),
                partial: false,
            };
            writes.events.push(match dice.below(3) {
                0 => placed(event, nowhere),
                _ => outlier(event),
            });
        }
        fixture.commit(writes).await.unwrap();
        graph.extend(made);
    }
    graph
}

async fn check_shared(fixture: &Fixture, graph: &[Made]) {
    let mut dice = Dice(12);
    let (mut found, mut asked) = (0, 0);
    for _ in 0..40 {
        let common = map_of(graph, &mut dice, GRAPH_KEYS / 2);
        let maps: Vec<StateMap> = (0..2)
            .map(|_| {
                let mut map = common.clone();
                map.extend(&map_of(graph, &mut dice, 3));
                map
            })
            .collect();
        let also = Vec::new();
        let question = Load::Closure {
            maps: maps.clone(),
            also,
        };
        let Loaded::Closure(mut set) = fixture.load(question).await else {
            panic!("not what was asked for");
        };
        let shared = std::mem::take(&mut set.shared);
        let by_id = |id: &EventId| graph.iter().find(|made| made.pdu.event_id == *id).unwrap();
        let mut chain = BTreeSet::new();
        let mut open: Vec<&EventId> = Vec::new();
        for made in graph {
            if maps
                .iter()
                .all(|map| map.get(made.key.unwrap()) == Some(made.nid))
            {
                open.extend(&made.pdu.auth_events);
            }
        }
        while let Some(id) = open.pop() {
            let made = by_id(id);
            if chain.insert(made.nid) {
                open.extend(&made.pdu.auth_events);
            }
        }
        for nid in in_question(&maps, &set, &[]) {
            assert_eq!(shared.contains(&nid), chain.contains(&nid));
            asked += 1;
            found += usize::from(chain.contains(&nid));
        }
    }
    assert!(found > 10 && asked > found + 10, "{found} of {asked}");
}

fn map_of(graph: &[Made], dice: &mut Dice, entries: usize) -> StateMap {
    (0..entries)
        .map(|_| &graph[dice.below(graph.len())])
        .map(|made| (made.key.unwrap(), made.nid))
        .collect()
}

/// SplitMix64.
struct Dice(u64);

impl Dice {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % end as u64) as usize
    }
}

pub async fn an_out_of_band_membership_ends_with_a_real_one(database: &Database) {
    let mut fixture = Fixture::new(database).await;
    let content = json!({"membership": "invite"});
    let alice = "@alice:localhost";
    let invite = fixture.draft(
        "@bob:b.org",
        "m.room.member",
        Some(alice),
        content,
        &[],
        &[],
        9,
    );
    let invite = fixture.intern(&[invite]).await.remove(0);
    let mut writes = WriteSet::new(fixture.room.clone(), VERSION);
    writes.events.push(outlier(&invite));
    writes.out_of_band.push(OutOfBand {
        user: user(alice),
        membership: "invite".into(),
        event: invite.nid,
        instead_of: Former::Only(None),
        stripped_state: vec!["{\"type\":\"m.room.name\"}".into(), "not json".into()],
        via: server("b.org"),
    });
    let applied = fixture.commit(writes).await.unwrap();
    assert_eq!(applied.out_of_band, [(user(alice), 1)]);
    assert!(matches!(fixture.load(Load::Head).await, Loaded::Head(None)));
    let question = Load::OutOfBand { user: user(alice) };
    let Loaded::OutOfBand(Some(stored)) = fixture.load(question.clone()).await else {
        panic!()
    };
    assert_eq!((stored.nid, &*stored.membership), (invite.nid, "invite"));
    assert_eq!(stored.stripped_state, ["{\"type\":\"m.room.name\"}".into()]);
    let listed = fixture
        .store
        .read(|c| out_of_band::of_user(c, &user("@alice:localhost"), 0, 1))
        .await
        .unwrap();
    assert_eq!(listed.len(), 1);
    // A refusal of what is no longer there, and one of what is.
    let content = json!({"membership": "leave"});
    let refusal = fixture.draft(
        "@bob:b.org",
        "m.room.member",
        Some(alice),
        content,
        &[],
        &[],
        10,
    );
    let refusal = fixture.intern(&[refusal]).await.remove(0);
    for (former, outcome) in [
        (Some(refusal.nid), Err(Stale)),
        (None, Err(Stale)),
        (Some(invite.nid), Ok(())),
    ] {
        let mut writes = WriteSet::new(fixture.room.clone(), VERSION);
        writes.events.push(outlier(&refusal));
        writes.out_of_band.push(OutOfBand {
            user: user(alice),
            membership: "leave".into(),
            event: refusal.nid,
            instead_of: Former::Only(former),
            stripped_state: Vec::new(),
            via: server("b.org"),
        });
        assert_eq!(fixture.commit(writes).await.map(drop), outcome);
    }
    fixture
        .say("@bob:b.org", "m.room.create", Some(""), json!({}))
        .await;
    fixture.join(alice).await;
    assert!(matches!(
        fixture.load(question).await,
        Loaded::OutOfBand(None)
    ));
}

pub async fn what_is_sent_waits_in_the_outbox(database: &Database) {
    let mut fixture = Fixture::joined(database).await;
    let (made, state) = fixture
        .make(
            "@alice:localhost",
            "m.room.message",
            None,
            json!({"body": "hi"}),
        )
        .await;
    let mut writes = fixture.appending(&made, state);
    let servers = ["b.org", "localhost", "c.org"].map(server);
    writes.events[0].fan_out = FanOut::Servers(servers.to_vec());
    writes.events[0].transaction = Some(Transaction {
        user: user("@alice:localhost"),
        device: "DEVICE".to_owned(),
        txn_id: "1".to_owned(),
    });
    let applied = fixture.commit(writes).await.unwrap();
    assert_eq!(applied.destinations, [server("b.org"), server("c.org")]);
    let waiting = fixture
        .store
        .read(|c| queues::waiting(c, &server("c.org"), 10))
        .await
        .unwrap();
    assert_eq!(waiting.len(), 1);
    assert_eq!(
        waiting[0].what,
        queues::Cargo::Pdu(made.pdu.json.to_string())
    );
    let none = fixture
        .store
        .read(|c| queues::waiting(c, &server("localhost"), 10))
        .await
        .unwrap();
    assert!(none.is_empty());
}

pub async fn history_has_positions_below_zero(database: &Database) {
    let mut fixture = Fixture::new(database).await;
    let unseen = EventId::parse("$unseen").unwrap();
    let one = fixture.draft(
        "@bob:b.org",
        "m.text",
        None,
        json!({"n": 1}),
        &[unseen],
        &[],
        1,
    );
    let prev = std::slice::from_ref(&one.event_id).to_vec();
    let two = fixture.draft("@bob:b.org", "m.text", None, json!({"n": 2}), &prev, &[], 2);
    let made = fixture.intern(&[one, two]).await;
    let mut writes = fixture.writes();
    for made in &made {
        let empty = EventState {
            before: StateMap::new(),
            after: StateMap::new(),
            partial: false,
        };
        let mut event = placed(made, empty);
        event.place = Place::Backfilled;
        writes.events.push(event);
    }
    let applied = fixture.commit(writes).await.unwrap();
    let positions: Vec<i64> = applied
        .events
        .iter()
        .map(|placed| placed.position)
        .collect();
    assert_eq!(positions, [-2, -1]);
    let Loaded::Children(children) = fixture
        .load(Load::Children {
            events: vec![made[0].nid],
        })
        .await
    else {
        panic!()
    };
    assert_eq!(children[&made[0].nid][0].nid, made[1].nid);
}

/// A crash is a store that nobody closes: its threads still hold the database when it is opened again.
pub async fn what_was_committed_survives_a_crash(database: &Database) {
    if !database.lasting {
        return;
    }
    let mut fixture = Fixture::joined(database).await;
    let (made, state) = fixture
        .make(
            "@alice:localhost",
            "m.room.message",
            None,
            json!({"body": "hi"}),
        )
        .await;
    let writes = fixture.appending(&made, state);
    fixture.commit(writes).await.unwrap();
    let old = std::mem::replace(&mut fixture.store, database.open().await);
    std::mem::forget(old);
    let head = fixture.head().await;
    assert_eq!((head.revision, head.state.len()), (3, 2));
    assert_eq!(head.forward_extremities, [tip(&made, false)]);
    fixture
        .say(
            "@alice:localhost",
            "m.room.message",
            None,
            json!({"body": "again"}),
        )
        .await;
}
