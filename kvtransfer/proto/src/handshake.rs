//! Who connects to whom and when, and who may: what the two sides of a handshake decide. How a connection is made, and
//! the way for data, are the driver's.
//!
//! ```text
//!        dials ──► Dialling ──► link        refused as crossed: the peer's own attempt is waited for
//! Away                 │ hello of the smaller instance: our attempt is given up
//!        hello ──► Answering ──► link
//! ```
//!
//! Both sides may begin at the same time. Then the attempt of the smaller instance counts; the other is refused as
//! [`CROSSED`], which is no failure.

use std::time::Duration;

use crate::message::{Hello, PROTOCOL, Refuse, TransportKind};
use crate::units::Moment;

/// What is being done about a connection to one peer, beside the link that may be up. One handshake at a time.
#[derive(Clone, Debug)]
pub struct Contact {
    ours: u64,
    theirs: u64,
    stage: Stage,
    /// Not to be dialled before.
    retry_at: Moment,
    backoff: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Away,
    /// A handshake that this side began.
    Dialling {
        deadline: Moment,
    },
    /// A handshake that the peer began.
    Answering {
        deadline: Moment,
    },
}

impl Contact {
    /// Between the worker of instance `ours` and the one of instance `theirs`.
    pub fn new(ours: u64, theirs: u64, now: Moment) -> Self {
        Self { ours, theirs, stage: Stage::Away, retry_at: now, backoff: FIRST_BACKOFF }
    }

    /// Somebody knows where the peer is: it is worth an attempt at once.
    pub fn met(&mut self, now: Moment) {
        self.retry_at = now;
    }

    /// Whether a handshake is under way.
    pub fn is_under_way(&self) -> bool {
        self.stage != Stage::Away
    }

    /// Whether the peer is to be dialled now, if that is wanted.
    pub fn is_due(&self, has_link: bool, now: Moment) -> bool {
        !has_link && !self.is_under_way() && self.retry_at <= now
    }

    /// This side dials; the handshake may take as long as `patience`.
    pub fn dials(&mut self, patience: Duration, now: Moment) {
        self.stage = Stage::Dialling { deadline: now.plus(patience) };
    }

    /// Whether a hello of the peer is answered; otherwise it is refused as [`crossed`].
    pub fn answers_hello(&self) -> bool {
        !matches!(self.stage, Stage::Dialling { .. }) || self.theirs < self.ours
    }

    /// The peer's hello was answered: an attempt of this side, and an older one of the peer, is given up.
    pub fn answered_hello(&mut self, patience: Duration, now: Moment) {
        self.stage = Stage::Answering { deadline: now.plus(patience) };
    }

    /// The peer has refused this side's attempt as crossed. Another one is due only should the peer's come to nothing.
    pub fn crossed(&mut self, patience: Duration, now: Moment) {
        self.end(matches!(self.stage, Stage::Dialling { .. }));
        self.retry_at = now.plus(patience);
    }

    /// This side's attempt has failed.
    pub fn dial_failed(&mut self, now: Moment) {
        self.end(matches!(self.stage, Stage::Dialling { .. }));
        self.back_off(now);
    }

    /// The peer's attempt has come to its end, whichever.
    pub fn answer_ended(&mut self) {
        self.end(matches!(self.stage, Stage::Answering { .. }));
    }

    /// A handshake has succeeded.
    pub fn is_up(&mut self) {
        self.stage = Stage::Away;
        self.backoff = FIRST_BACKOFF;
    }

    /// The link is gone.
    pub fn link_lost(&mut self, now: Moment) {
        self.back_off(now);
    }

    /// Whether the handshake under way has taken too long. Some step of it may need `extra` time by its nature.
    pub fn is_late(&self, extra: Duration, now: Moment) -> bool {
        self.deadline().is_some_and(|deadline| deadline.plus(extra) <= now)
    }

    /// When something is due: the end of a handshake, or an attempt that is wanted.
    pub fn next_clock(&self, has_link: bool, is_wanted: bool, extra: Duration) -> Option<Moment> {
        match self.deadline() {
            Some(deadline) => Some(deadline.plus(extra)),
            None => (is_wanted && !has_link).then_some(self.retry_at),
        }
    }

    fn deadline(&self) -> Option<Moment> {
        match self.stage {
            Stage::Away => None,
            Stage::Dialling { deadline } | Stage::Answering { deadline } => Some(deadline),
        }
    }

    fn end(&mut self, is_it: bool) {
        if is_it {
            self.stage = Stage::Away;
        }
    }

    /// Longer before each further attempt.
    fn back_off(&mut self, now: Moment) {
        self.retry_at = now.plus(self.backoff);
        self.backoff = (self.backoff * 2).min(LONGEST_BACKOFF);
    }
}

impl Hello {
    /// How many blocks it has.
    pub fn blocks(&self) -> u64 {
        self.region_bytes.saturating_sub(self.staging_bytes) / self.layout.block_bytes() as u64
    }

    /// Whether both are on one host, and of one user.
    pub fn is_same_host(&self, theirs: &Self) -> bool {
        !self.host.is_empty() && self.host == theirs.host
    }

    /// Whether this side can work with whoever says that about itself.
    ///
    /// # Errors
    ///
    /// What to tell the peer: the field that does not fit, and why.
    pub fn check(&self, theirs: &Self) -> Result<(), Refuse> {
        if theirs.protocol != PROTOCOL {
            return refuse("protocol", format!("{PROTOCOL} here, {} at the peer", theirs.protocol));
        }
        if theirs.instance == self.instance {
            return refuse("instance", "it is this worker itself".to_owned());
        }
        if MAX_NAME < theirs.name.len() {
            return refuse("name", format!("longer than {MAX_NAME} bytes"));
        }
        if let (Err(mismatch), Err(_)) =
            (self.layout.bridge(&theirs.layout), theirs.layout.bridge(&self.layout))
        {
            return refuse(
                mismatch.field,
                format!("{} here, {} at the peer", mismatch.ours, mismatch.theirs),
            );
        }
        if theirs.blocks() == 0 {
            return refuse("region_bytes", "less than one block".to_owned());
        }
        if self.best_way(theirs).is_none() {
            return refuse("transports", "no way for data that both sides accept".to_owned());
        }
        Ok(())
    }

    /// The same for the answer of whoever was reached when the worker of instance `dialled` was: where that has died,
    /// another one may have its address.
    ///
    /// # Errors
    ///
    /// The field that does not fit, and why.
    pub fn check_answer(&self, dialled: u64, theirs: &Self) -> Result<(), Refuse> {
        if theirs.instance != dialled {
            return refuse("instance", format!("{:016x} answers there, not {dialled:016x}", theirs.instance));
        }
        self.check(theirs)
    }

    /// The best way for data that both sides accept.
    pub fn best_way(&self, theirs: &Self) -> Option<TransportKind> {
        self.offer.common(theirs.offer, self.is_same_host(theirs))
    }

    /// Whether a peer may come by this way: the best one, or TCP where both allow it to stand in.
    pub fn agrees_to(&self, way: TransportKind, theirs: &Self) -> bool {
        let stands_in = way == TransportKind::Tcp && self.offer.may_fall_back(theirs.offer);
        stands_in || self.best_way(theirs) == Some(way)
    }
}

impl Refuse {
    /// Both sides began to connect at the same time, and the other attempt counts.
    pub fn crossed() -> Self {
        Self { field: CROSSED.to_owned(), reason: "this side connects already".to_owned() }
    }

    /// Whether that is all that it says.
    pub fn is_crossed(&self) -> bool {
        self.field == CROSSED
    }
}

fn refuse(field: &str, reason: String) -> Result<(), Refuse> {
    Err(Refuse { field: field.to_owned(), reason })
}

/// The field of a refusal that is none.
pub const CROSSED: &str = "crossed";
/// Longest name, in bytes.
const MAX_NAME: usize = 256;
const FIRST_BACKOFF: Duration = Duration::from_millis(50);
const LONGEST_BACKOFF: Duration = Duration::from_millis(500);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{AxisOrder, HeadRange, KvDtype, KvLayout};
    use crate::message::{Offer, OnFailure};
    use crate::units::BlockLen;

    const PATIENCE: Duration = Duration::from_secs(2);

    /// What happens to a contact, word by word, and when it dials by itself within two seconds after that, in ms.
    #[test]
    fn when_a_peer_is_dialled() {
        #[rustfmt::skip]
        let rows = [
            // what is shown                                          ours, what happens                   dialled after
            ("a new peer is dialled at once",                            1, "",                            Some(0)),
            ("not while that goes on",                                   1, "dial",                        None),
            ("nor while it dials itself",                                1, "hello",                       None),
            ("a failure is not repeated at once",                        1, "dial fail",                   Some(50)),
            ("… each further one later",                                 1, "dial fail dial fail",         Some(100)),
            ("… up to a bound",                                          1, "fail fail fail fail fail fail fail", Some(500)),
            ("… until somebody asks again",                              1, "fail fail fail met",          Some(0)),
            ("… or a link was up meanwhile",                             1, "fail fail fail up lost",      Some(50)),
            ("a link that is up is enough",                              1, "dial up",                     None),
            ("a link that was lost is made anew",                        1, "dial up lost",                Some(50)),
            ("who was refused as crossed waits for the other attempt",   2, "dial crossed",                Some(2_000)),
            ("… whose end makes it no sooner",                           2, "dial crossed hello end",      Some(2_000)),
            ("an attempt of the peer that fails leaves the turn to us",  1, "hello end",                   Some(0)),
            ("the smaller instance's own attempt counts",                1, "dial hello fail",             Some(50)),
            ("the larger one's gives way to the peer's",                 2, "dial hello end",              Some(0)),
            ("the end of an attempt that gave way is no end of ours",    1, "dial end",                    None),
        ];
        for (name, ours, happenings, expected) in rows {
            let now = Moment(Duration::from_secs(100));
            let mut contact = Contact::new(ours, 3 - ours, now);
            let mut has_link = false;
            for word in happenings.split_whitespace() {
                match word {
                    "dial" => contact.dials(PATIENCE, now),
                    "hello" if contact.answers_hello() => contact.answered_hello(PATIENCE, now),
                    "hello" => {}
                    "crossed" => contact.crossed(PATIENCE, now),
                    "fail" => contact.dial_failed(now),
                    "end" => contact.answer_ended(),
                    "met" => contact.met(now),
                    "up" => {
                        contact.is_up();
                        has_link = true;
                    }
                    "lost" => {
                        contact.link_lost(now);
                        has_link = false;
                    }
                    other => panic!("`{other}` is no happening"),
                }
            }
            let due = (0..=2_000).find(|&ms| contact.is_due(has_link, now.plus(Duration::from_millis(ms))));
            assert_eq!(due, expected, "{name}");
            let clock =
                contact.next_clock(has_link, true, Duration::ZERO).map(|at| at.since(now).as_millis());
            let handshake_ends = contact.is_under_way().then_some(2_000);
            assert_eq!(clock, expected.map(u128::from).or(handshake_ends), "{name}: its clock");
            assert_eq!(
                contact.next_clock(has_link, false, Duration::ZERO).is_some(),
                contact.is_under_way(),
                "{name}"
            );
        }
    }

    #[test]
    fn a_handshake_has_its_time_and_what_it_needs_beyond() {
        let (begun, extra) = (Moment::default(), Duration::from_secs(30));
        let mut contact = Contact::new(1, 2, begun);
        assert!(!contact.is_late(Duration::ZERO, begun.plus(PATIENCE)), "none is under way");
        contact.dials(PATIENCE, begun);
        let shortly_before = begun.plus(PATIENCE - Duration::from_millis(1));
        for (extra, now, expected) in [
            (Duration::ZERO, shortly_before, false),
            (Duration::ZERO, begun.plus(PATIENCE), true),
            (extra, begun.plus(PATIENCE), false),
            (extra, begun.plus(PATIENCE + extra), true),
        ] {
            assert_eq!(contact.is_late(extra, now), expected, "{extra:?} more, at {now:?}");
        }
        assert_eq!(contact.next_clock(false, false, extra), Some(begun.plus(PATIENCE + extra)));
    }

    #[test]
    fn who_may_come_in() {
        let ours = hello(1);
        type Change = fn(&mut Hello);
        #[rustfmt::skip]
        let rows: [(&str, Change, Result<(), &str>); 12] = [
            ("a worker of another number",            |_| {},                                       Ok(())),
            ("another layout that can be bridged",    |it| it.layout.dtype = KvDtype::Bf16,         Ok(())),
            ("another version",                       |it| it.protocol += 1,                        Err("protocol")),
            ("this worker itself",                    |it| it.instance = 1,                         Err("instance")),
            ("a name without end",                    |it| it.name = "x".repeat(257),               Err("name")),
            ("another model",                         |it| it.layout.model = "other".to_owned(),    Err("model")),
            ("an arena without a block",              |it| it.region_bytes = 1,                     Err("region_bytes")),
            ("… beside what is no block",             |it| it.staging_bytes = it.region_bytes,      Err("region_bytes")),
            ("more that is no block than there is",   |it| it.staging_bytes = it.region_bytes + 1,  Err("region_bytes")),
            ("no way in common",                      |it| { it.offer.tcp = false; it.offer.shared_memory = false }, Err("transports")),
            ("shared memory of another host",         |it| { it.offer.tcp = false; it.host = "there".to_owned() }, Err("transports")),
            ("shared memory of this host",            |it| it.offer.tcp = false,                    Ok(())),
        ];
        for (name, change, expected) in rows {
            let mut theirs = hello(2);
            change(&mut theirs);
            let found = ours.check(&theirs).map_err(|refuse| refuse.field);
            assert_eq!(found, expected.map_err(str::to_owned), "{name}");
        }
        let answer = |instance| ours.check_answer(2, &hello(instance)).map_err(|refuse| refuse.field);
        assert_eq!(
            (answer(2), answer(3)),
            (Ok(()), Err("instance".to_owned())),
            "another one has its address"
        );
        assert!(Refuse::crossed().is_crossed());
    }

    #[test]
    fn which_way_a_peer_may_come() {
        use TransportKind::{Rdma, SharedMemory, Tcp};
        let all = Offer { shared_memory: true, rdma: true, tcp: true, on_failure: OnFailure::FallBack };
        let strict = Offer { on_failure: OnFailure::Fail, ..all };
        #[rustfmt::skip]
        let rows = [
            ("one host takes memory",           all,    "here",  SharedMemory, true),
            ("… not a device",                  all,    "here",  Rdma,         false),
            ("two hosts take a device",         all,    "there", Rdma,         true),
            ("… not memory",                    all,    "there", SharedMemory, false),
            ("TCP may stand in",                all,    "there", Tcp,          true),
            ("… not where one side forbids it", strict, "there", Tcp,          false),
        ];
        for (name, offer, host, way, expected) in rows {
            let ours = Hello { offer: all, ..hello(1) };
            let theirs = Hello { offer, host: host.to_owned(), ..hello(2) };
            assert_eq!(ours.agrees_to(way, &theirs), expected, "{name}");
        }
    }

    fn hello(instance: u64) -> Hello {
        let layout = KvLayout {
            model: "test".to_owned(),
            layers: 1,
            kv_heads: 1,
            heads: HeadRange { first: 0, count: 1 },
            head_size: 2,
            dtype: KvDtype::F32,
            block_len: BlockLen::new(4).unwrap(),
            order: AxisOrder::TokenHead,
        };
        Hello {
            protocol: PROTOCOL,
            instance,
            name: "worker".to_owned(),
            region_bytes: 8 * layout.block_bytes() as u64,
            staging_bytes: 0,
            layout,
            listen_port: 1,
            host: "here".to_owned(),
            memory_socket: "socket".to_owned(),
            offer: Offer { shared_memory: true, rdma: false, tcp: true, on_failure: OnFailure::FallBack },
            pulls: false,
            lease: Duration::from_millis(500),
        }
    }
}
