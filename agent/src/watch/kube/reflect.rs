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
use tokio::sync::Mutex;
use tokio::sync::mpsc::Sender;
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
        Self { resource, timing, servers, voice, events, ledger, backoff, faults: 0, said: Vec::new() }
    }

    pub(super) async fn run(mut self) {
        loop {
            let server = self.servers.current();
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
            let server = self.servers.current();
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
            while let Some(bytes) = next(&mut body, self.timing.patience).await? {
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
        while let Some(bytes) = next(&mut body, self.timing.idle).await? {
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
        &self,
        server: &Server,
        request: Result<Request<Vec<u8>>, kube::core::request::Error>,
    ) -> Result<Response<Body>, Fault> {
        let unreachable = |error| Fault::Unreachable { error };
        let request = request.map_err(kube::Error::BuildRequest).map_err(unreachable)?;
        let sent = timeout(self.timing.patience, server.client.send(request.map(Body::from))).await;
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

    /// Waits, and says so where it is not the first fault in a row: connections end every day.
    async fn suffer(&mut self, server: &Server, mut fault: Fault) {
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
        if self.faults > 1 && !fault.is_expired() {
            self.voice.lock().await.lost(self.ledger.kind(), &why).await;
        }
        let delay = self.backoff.next().max(fault.retry_after().min(LEFT_ALONE));
        sleep(delay).await;
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
async fn next(body: &mut Body, patience: Duration) -> Result<Option<Bytes>, Fault> {
    loop {
        let Ok(frame) = timeout(patience, body.frame()).await else {
            return Err(Fault::Silent { waited: patience });
        };
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
