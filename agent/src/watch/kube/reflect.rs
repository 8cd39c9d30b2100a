//! One kind: list, then watch from there; after a fault go on where it was.

use std::sync::Arc;
use std::time::Duration;

use http_body_util::BodyExt as _;
use hyper::body::Bytes;
use hyper::{Request, Response};
use kube::api::{ListParams, WatchParams};
use kube::client::Body;
use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::sync::mpsc::Sender;
use tokio::sync::{Mutex, watch};
use tokio::time::{Instant, sleep, timeout};

use super::super::Event;
use super::access::{Server, Servers};
use super::backoff::{Backoff, random};
use super::fault::{Fault, Garbage};
use super::frames::{Elements, Lines};
use super::ledger::{self, Ledger};
use super::voice::Voice;
use super::{Age, Resource, Timing};

/// How many objects a page of a list has.
const PAGE: u32 = 500;

/// A watch that is refused so often in a row is begun anew with a list: its version may be one that no server has, as
/// after a restored etcd.
const REFUSALS: u32 = 5;

/// How often a kind is asked for again that comes with another version of the API servers.
const UPGRADE: Duration = Duration::from_secs(600);

/// The longest that a server may ask to be left alone.
const LEFT_ALONE: Duration = Duration::from_secs(60);

pub(super) struct Reflector {
    resource: &'static Resource,
    timing: Timing,
    servers: Arc<Servers>,
    voice: Arc<Mutex<Voice>>,
    events: Sender<Event>,
    ledger: Ledger,
    backoff: Backoff,
    /// Changes when the connections of before are to be left.
    moves: watch::Receiver<u64>,
    /// Faults in a row.
    faults: u32,
    /// What is to be sent; kept here so that a fault in a chunk does not lose what came before it.
    said: Vec<Event>,
}

/// A line of a watch.
#[derive(Deserialize)]
struct Frame<'a> {
    r#type: &'a str,
    #[serde(borrow)]
    object: &'a RawValue,
}

/// What a server says went wrong.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Status {
    code: u16,
    message: String,
}

impl Reflector {
    pub(super) fn new(
        resource: &'static Resource,
        ledger: Ledger,
        (servers, voice): (Arc<Servers>, Arc<Mutex<Voice>>),
        events: Sender<Event>,
        timing: Timing,
    ) -> Self {
        let backoff = Backoff::new(timing.first_retry, timing.last_retry);
        let (moves, said) = (servers.moves(), Vec::new());
        Self { resource, timing, servers, voice, events, ledger, backoff, moves, faults: 0, said }
    }

    pub(super) async fn run(mut self) {
        loop {
            let server = self.server();
            match self.list(&server).await {
                Ok(version) => {
                    self.reached().await;
                    self.succeeded();
                    self.voice.lock().await.listed(self.ledger.kind()).await;
                    self.follow(version).await;
                }
                Err(fault) => match self.comes_within().filter(|_| fault.is_unknown()) {
                    Some(pause) => {
                        tracing::debug!("the API has no {:?}", self.ledger.kind());
                        self.reached().await;
                        self.succeeded();
                        self.voice.lock().await.listed(self.ledger.kind()).await;
                        sleep(pause).await;
                    }
                    None => self.suffer(&server, fault).await,
                },
            }
        }
    }

    /// Whom to ask now, on connections that are not to be left.
    fn server(&mut self) -> Server {
        self.moves.mark_unchanged();
        self.servers.current()
    }

    /// When a kind that API servers do not have is asked for again; `None` where all have it.
    fn comes_within(&self) -> Option<Duration> {
        match self.resource.age {
            Age::Old => None,
            Age::New => Some(UPGRADE),
            Age::Defined => Some(self.timing.undefined),
        }
    }

    /// Watches from this version on. Returns when there has to be a list again.
    async fn follow(&mut self, mut version: Box<str>) {
        let mut refusals = 0;
        loop {
            let server = self.server();
            let (start, before) = (Instant::now(), version.clone());
            let outcome = self.watch(&server, &mut version).await;
            if version != before {
                refusals = 0;
                self.succeeded();
            }
            match outcome {
                Ok(()) if version != before || start.elapsed() >= self.timing.first_retry => {}
                // Ends as fast as it begins.
                Ok(()) => sleep(self.backoff.next()).await,
                Err(fault) => {
                    refusals += u32::from(fault.is_about_the_version());
                    let relist = fault.is_expired() || refusals >= REFUSALS;
                    self.suffer(&server, fault).await;
                    if relist {
                        return;
                    }
                }
            }
        }
    }

    /// Takes in all objects of the kind. Returns the version of the list.
    async fn list(&mut self, server: &Server) -> Result<Box<str>, Fault> {
        self.ledger.begin();
        let mut params = ListParams { field_selector: self.resource.selector(), ..ListParams::default() };
        params = params.limit(PAGE);
        loop {
            let request = kube::core::Request::new(self.resource.path).list(&params);
            let mut body = self.ask(server, request).await?.into_body();
            let mut elements = Elements::default();
            while let Some(bytes) = next(&mut body, self.timing.patience, &mut self.moves).await? {
                let (ledger, said) = (&mut self.ledger, &mut self.said);
                let taken = elements.push(&bytes, |object| ledger.take(object, said).map(drop));
                self.say().await;
                taken?;
            }
            let page = elements.finish()?.metadata;
            if page.r#continue.is_empty() {
                self.ledger.finish(&mut self.said);
                self.say().await;
                return Ok(page.resource_version.into());
            }
            params.continue_token = Some(page.r#continue);
        }
    }

    /// Takes in what changes, until the server ends the watch. `version` follows.
    async fn watch(&mut self, server: &Server, version: &mut Box<str>) -> Result<(), Fault> {
        let seconds = random(self.timing.watch / 2, self.timing.watch).as_secs();
        let params = WatchParams {
            field_selector: self.resource.selector(),
            timeout: u32::try_from(seconds.max(1)).ok(),
            bookmarks: true,
            ..WatchParams::default()
        };
        let request = kube::core::Request::new(self.resource.path).watch(&params, version);
        let mut body = self.ask(server, request).await?.into_body();
        self.reached().await;
        let mut lines = Lines::default();
        while let Some(bytes) = next(&mut body, self.timing.idle, &mut self.moves).await? {
            let (ledger, said) = (&mut self.ledger, &mut self.said);
            let taken = lines.push(&bytes, |line| {
                *version = event(line, ledger, said)?;
                Ok::<_, Fault>(())
            });
            self.say().await;
            taken?;
        }
        Ok(())
    }

    /// The answer's head has come, and it is none of refusal.
    async fn ask(
        &mut self,
        server: &Server,
        request: Result<Request<Vec<u8>>, kube::core::request::Error>,
    ) -> Result<Response<Body>, Fault> {
        let unreachable = |error| Fault::Unreachable { error };
        let request = request.map_err(kube::Error::BuildRequest).map_err(unreachable)?;
        let sent = timeout(self.timing.patience, server.client.send(request.map(Body::from)));
        let sent = tokio::select! {
            sent = sent => sent,
            () = moved(&mut self.moves) => return Err(Fault::Moved),
        };
        let Ok(response) = sent else { return Err(Fault::Silent { waited: self.timing.patience }) };
        let response = response.map_err(unreachable)?;
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status().as_u16();
        let header = response.headers().get(hyper::header::RETRY_AFTER);
        let seconds = header.and_then(|value| value.to_str().ok()?.parse().ok());
        let text = timeout(self.timing.patience, response.into_body().collect_bytes()).await;
        let text = text.ok().and_then(Result::ok).unwrap_or_default();
        let Status { message, .. } = serde_json::from_slice(&text).unwrap_or_default();
        Err(Fault::Refused { status, message: message.into(), retry_after: seconds.map(Duration::from_secs) })
    }

    async fn say(&mut self) {
        for event in self.said.drain(..) {
            // A receiver that is gone ends the source.
            let _closed = self.events.send(event).await;
        }
        if let Some(problems) = self.ledger.take_problems() {
            self.voice.lock().await.problems(self.ledger.kind(), problems).await;
        }
    }

    async fn reached(&self) {
        self.voice.lock().await.reached(self.ledger.kind()).await;
    }

    fn succeeded(&mut self) {
        self.faults = 0;
        self.backoff.reset();
    }

    /// Waits, and says so where it is not the first fault in a row: connections end every day. The wait ends early where this
    /// host's addresses change.
    async fn suffer(&mut self, server: &Server, mut fault: Fault) {
        if matches!(fault, Fault::Moved) {
            return;
        }
        if fault.is_of_the_server() {
            self.servers.leave(server);
        }
        if fault.is_unauthorized()
            && let Err(error) = self.servers.renew().await
        {
            fault = error.into();
        }
        self.faults = self.faults.saturating_add(1);
        let why = format!("{}: {fault}", server.address);
        tracing::debug!(kind = ?self.ledger.kind(), faults = self.faults, "{why}");
        if fault.is_expired() {
            // Said by a server that is there: what went while none was is to be gone soon.
            self.backoff.reset();
        } else if self.faults > 1 {
            self.voice.lock().await.lost(self.ledger.kind(), &why).await;
        }
        let delay = self.backoff.next().max(fault.retry_after().min(LEFT_ALONE));
        tokio::select! {
            () = sleep(delay) => {}
            () = moved(&mut self.moves) => {}
        }
    }
}

/// Takes in one line of a watch. Returns the version at which the kind is now.
fn event(line: &[u8], ledger: &mut Ledger, said: &mut Vec<Event>) -> Result<Box<str>, Fault> {
    let frame = serde_json::from_slice(line).map_err(|error| Garbage::NoEvent { error })?;
    let Frame { r#type, object } = frame;
    let object = object.get().as_bytes();
    match r#type {
        "ADDED" | "MODIFIED" => Ok(ledger.take(object, said)?),
        "DELETED" => Ok(ledger.remove(object, said)?),
        "BOOKMARK" => Ok(ledger::version(object)?),
        "ERROR" => {
            let Status { code, message } = serde_json::from_slice(object).unwrap_or_default();
            Err(Fault::Refused { status: code, message: message.into(), retry_after: None })
        }
        other => Err(Garbage::NoSuchEvent { text: other.to_owned() }.into()),
    }
}

/// The next piece of an answer; `None` where it is complete.
async fn next(
    body: &mut Body,
    patience: Duration,
    moves: &mut watch::Receiver<u64>,
) -> Result<Option<Bytes>, Fault> {
    loop {
        let frame = tokio::select! {
            frame = timeout(patience, body.frame()) => frame,
            () = moved(moves) => return Err(Fault::Moved),
        };
        let Ok(frame) = frame else { return Err(Fault::Silent { waited: patience }) };
        match frame.transpose().map_err(|error| Fault::Cut { error })? {
            None => return Ok(None),
            Some(frame) => {
                if let Ok(bytes) = frame.into_data() {
                    return Ok(Some(bytes));
                }
            }
        }
    }
}

/// Until connections of before are to be left.
async fn moved(moves: &mut watch::Receiver<u64>) {
    if moves.changed().await.is_err() {
        std::future::pending().await
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::{Mutex as StdMutex, MutexGuard, PoisonError};

    use futures_util::stream;
    use http_body_util::combinators::UnsyncBoxBody;
    use http_body_util::{Full, StreamBody};
    use hyper::body::Frame as Piece;
    use kube::Client;
    use tokio::sync::mpsc;

    use super::super::RESOURCES;
    use super::*;
    use crate::model::{Change, Kind};
    use crate::watch::Contact;

    const HOUR: Duration = Duration::from_secs(3600);

    type Answer = Response<UnsyncBoxBody<Bytes, io::Error>>;

    /// An API server of Services in tokio's time, which tests let pass.
    #[derive(Clone)]
    struct Api {
        state: Arc<StdMutex<State>>,
        /// Changes where every connection breaks.
        outages: watch::Sender<u32>,
    }

    #[derive(Clone, Copy, Default, PartialEq, Eq)]
    enum Mood {
        #[default]
        Serves,
        Away,
        /// The next watch is refused: what it asks for is forgotten.
        Forgot,
    }

    #[derive(Default)]
    struct State {
        mood: Mood,
        services: Vec<&'static str>,
        /// When it was asked, also while it was away.
        asked: Vec<Instant>,
    }

    impl Api {
        fn of(services: &[&'static str]) -> Self {
            let state = State { services: services.to_vec(), ..State::default() };
            Self { state: Arc::new(StdMutex::new(state)), outages: watch::Sender::new(0) }
        }

        fn state(&self) -> MutexGuard<'_, State> {
            self.state.lock().unwrap_or_else(PoisonError::into_inner)
        }

        fn go_away(&self) {
            self.state().mood = Mood::Away;
            self.outages.send_modify(|outages| *outages += 1);
        }

        /// Listens to it as the agent does, and says what it hears.
        fn follow(&self) -> (Arc<Servers>, mpsc::Receiver<Event>) {
            let api = self.clone();
            let service = tower::service_fn(move |request| std::future::ready(api.answer(&request)));
            let servers = Arc::new(Servers::of(Client::new(service, "default")));
            let (events, heard) = mpsc::channel(100);
            let resource = RESOURCES.iter().find(|resource| resource.kind == Kind::Service).unwrap();
            let voice = Arc::new(Mutex::new(Voice::new(events.clone(), [Kind::Service].into_iter())));
            let ledger = Ledger::new(Kind::Service, "here".into());
            let (both, timing) = ((servers.clone(), voice), Timing::default());
            tokio::spawn(Reflector::new(resource, ledger, both, events, timing).run());
            (servers, heard)
        }

        fn answer(&self, request: &Request<Body>) -> Result<Answer, io::Error> {
            let mut state = self.state();
            state.asked.push(Instant::now());
            if state.mood == Mood::Away {
                return Err(io::ErrorKind::ConnectionRefused.into());
            }
            let never = |error: std::convert::Infallible| match error {};
            if !request.uri().query().is_some_and(|query| query.contains("watch=")) {
                let item = |name| {
                    let spec = r#"{"clusterIP": "10.96.0.1", "ports": [{"port": 80}]}"#;
                    format!(r#"{{"metadata": {{"name": "{name}", "namespace": "default"}}, "spec": {spec}}}"#)
                };
                let items: Vec<_> = state.services.iter().map(item).collect();
                let list =
                    format!(r#"{{"metadata": {{"resourceVersion": "7"}}, "items": [{}]}}"#, items.join(","));
                return Ok(Response::new(UnsyncBoxBody::new(Full::from(list).map_err(never))));
            }
            if std::mem::take(&mut state.mood) == Mood::Forgot {
                let mut gone = Response::new(UnsyncBoxBody::new(Full::default().map_err(never)));
                *gone.status_mut() = hyper::StatusCode::GONE;
                return Ok(gone);
            }
            let mut outages = self.outages.subscribe();
            let cut = stream::once(async move {
                let _until = outages.changed().await;
                Err::<Piece<Bytes>, _>(io::ErrorKind::ConnectionReset.into())
            });
            Ok(Response::new(UnsyncBoxBody::new(StreamBody::new(cut))))
        }
    }

    /// What has been heard since it was last asked, in words.
    fn words(heard: &mut mpsc::Receiver<Event>) -> Vec<String> {
        let mut words = Vec::new();
        while let Ok(event) = heard.try_recv() {
            words.push(match event {
                Event::Change(Change::Service(name, service)) => {
                    format!("{} {}", name.name, if service.is_some() { "is" } else { "is gone" })
                }
                Event::Contact(Contact::Lost) => "lost".into(),
                Event::Contact(Contact::Regained) => "regained".into(),
                Event::Synced => "synced".into(),
                other @ (Event::Change(_) | Event::Triggered { .. } | Event::Problems(_)) => {
                    format!("{other:?}")
                }
            });
        }
        words
    }

    #[tokio::test(start_paused = true)]
    async fn an_hour_without_the_api_takes_nothing_and_costs_few_requests() {
        let api = Api::of(&["dns", "web"]);
        let (_servers, mut heard) = api.follow();
        sleep(Duration::from_secs(5)).await;
        assert_eq!(words(&mut heard), ["dns is", "web is", "synced"]);

        api.go_away();
        let away = Instant::now();
        sleep(HOUR).await;
        assert_eq!(words(&mut heard), ["lost"], "said once, and nothing is taken");
        let asked: Vec<_> = api.state().asked.iter().copied().filter(|at| *at > away).collect();
        let gaps: Vec<_> = asked.windows(2).map(|pair| pair[1] - pair[0]).collect();
        let Timing { first_retry, last_retry, .. } = Timing::default();
        let (late, most) = (&gaps[10..], 2 * HOUR.as_secs() / last_retry.as_secs());
        assert!(gaps.len() as u64 <= most + 10, "{} requests in an hour", asked.len());
        assert!(gaps.iter().all(|gap| *gap <= last_retry), "{gaps:?}");
        assert!(late.iter().all(|gap| *gap >= last_retry / 2), "{gaps:?}");
        let different: std::collections::BTreeSet<_> = late.iter().collect();
        assert!(different.len() > late.len() / 2, "all agents would ask at once: {gaps:?}");

        // Meanwhile an object was deleted, and the server forgot when.
        *api.state() = State { mood: Mood::Forgot, services: vec!["web"], ..State::default() };
        sleep(last_retry + Duration::from_secs(2)).await;
        assert_eq!(words(&mut heard), ["dns is gone", "regained"]);
        let asked = api.state().asked.clone();
        assert_eq!(asked.len(), 3, "a watch, a list, a watch");
        assert!(
            asked[1] - asked[0] <= first_retry,
            "it is listed {:?} after the server is back",
            asked[1] - asked[0]
        );
    }

    /// Such a watch would be taken to be dead after [`Timing::idle`].
    #[tokio::test(start_paused = true)]
    async fn a_connection_by_an_address_that_is_gone_is_left_at_once() {
        let api = Api::of(&["web"]);
        let (servers, mut heard) = api.follow();
        sleep(Duration::from_secs(5)).await;
        assert_eq!(api.state().asked.len(), 2, "a list and a watch");
        servers.reconnect().await;
        sleep(Duration::from_millis(1)).await;
        assert_eq!(api.state().asked.len(), 3, "another watch");
        assert_eq!(words(&mut heard), ["web is", "synced"], "no fault");

        // Who waits for the next try does not wait any longer.
        api.go_away();
        sleep(HOUR).await;
        let asked = api.state().asked.len();
        api.state().mood = Mood::Serves;
        servers.reconnect().await;
        sleep(Duration::from_millis(1)).await;
        assert_eq!(api.state().asked.len(), asked + 1);
        assert_eq!(words(&mut heard), ["lost", "regained"]);
    }
}
