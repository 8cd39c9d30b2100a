//! Notes to events of events.k8s.io/v1.

use std::sync::Arc;
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::events::v1::{Event, EventSeries};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kube::Api;
use kube::api::{GetParams, Patch, PatchParams, PostParams};
use serde::Deserialize;
use serde_json::json;
use tokio::sync::mpsc::Receiver;
use tokio::time::{sleep, timeout};

use super::access::{Server, Servers};
use super::backoff::Backoff;
use super::{RESOURCES, Scope};
use crate::events::Note;
use crate::events::series::{Post, Series};
use crate::model::ObjectId;

/// Who reports, as in `kubectl describe` in the column FROM.
const CONTROLLER: &str = "ferroflow";

/// What the API takes of a message, in bytes.
const MESSAGE: usize = 1024;

const PATIENCE: Duration = Duration::from_secs(30);

/// Posts what is noted, in order; while the API is away the notes wait in their queue.
pub(super) async fn post(servers: Arc<Servers>, node: Box<str>, mut notes: Receiver<Note>) {
    let mut series = Series::new(Instant::now());
    let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(60));
    while let Some(note) = notes.recv().await {
        let Some(post) = series.take(&note, Instant::now()) else { continue };
        let mut name: Box<str> = format!("{}.{:x}", note.object.name.name, unique()).into();
        loop {
            let server = servers.current();
            let sent = timeout(PATIENCE, send(&server, (&node, &name), &note, &post)).await;
            match sent {
                Ok(Ok(())) => break backoff.reset(),
                // It exists: a request before had no answer and was done.
                Ok(Err(kube::Error::Api(status))) if status.code == 409 => break,
                Ok(Err(kube::Error::Api(status)))
                    if (400..500).contains(&status.code) && status.code != 429 =>
                {
                    tracing::debug!("an event on {} is refused: {status}", note.object);
                    name = Box::default();
                    break;
                }
                Ok(Err(_)) | Err(_) => {
                    servers.leave(&server);
                    sleep(backoff.next()).await;
                }
            }
        }
        if post == Post::Create && !name.is_empty() {
            series.posted(note, name, Instant::now());
        }
    }
}

async fn send(server: &Server, (node, name): (&str, &str), note: &Note, post: &Post) -> kube::Result<()> {
    let namespace = &note.object.name.namespace;
    let events: Api<Event> = Api::namespaced(server.client.clone(), namespace);
    let now = MicroTime(Timestamp::now());
    match post {
        Post::Create => {
            let regarding = regarding(server, &note.object).await;
            let event = Event {
                metadata: ObjectMeta {
                    name: Some(name.into()),
                    namespace: Some(namespace.to_string()),
                    ..ObjectMeta::default()
                },
                event_time: Some(now),
                reporting_controller: Some(CONTROLLER.into()),
                reporting_instance: Some(format!("{CONTROLLER}-{node}")),
                action: Some(note.reason.action().into()),
                reason: Some(note.reason.as_str().into()),
                type_: Some("Warning".into()),
                note: Some(cut(&note.message).into()),
                regarding: Some(regarding),
                ..Event::default()
            };
            events.create(&PostParams::default(), &event).await.map(drop)
        }
        Post::Patch { event, count } => {
            let series =
                EventSeries { count: i32::try_from(*count).unwrap_or(i32::MAX), last_observed_time: now };
            let patch = Patch::Merge(json!({ "series": series }));
            events.patch(event, &PatchParams::default(), &patch).await.map(drop)
        }
    }
}

/// `kubectl describe` finds events by the object's uid, which is not kept and has to be asked for.
async fn regarding(server: &Server, id: &ObjectId) -> ObjectReference {
    #[derive(Deserialize)]
    struct Head {
        metadata: ObjectMeta,
    }
    let mut reference = ObjectReference {
        kind: Some(format!("{:?}", id.kind)),
        name: Some(id.name.name.to_string()),
        ..ObjectReference::default()
    };
    let Some(resource) = RESOURCES.iter().find(|resource| resource.kind == id.kind) else { return reference };
    let (group, plural) = resource.path.rsplit_once('/').unwrap_or_default();
    reference.api_version = Some(group.trim_start_matches("/apis/").trim_start_matches("/api/").into());
    let path = match resource.scope {
        Scope::Cluster => resource.path.to_owned(),
        Scope::Namespaced => {
            reference.namespace = Some(id.name.namespace.to_string());
            format!("{group}/namespaces/{}/{plural}", id.name.namespace)
        }
    };
    if let Ok(request) = kube::core::Request::new(path).get(&id.name.name, &GetParams::default())
        && let Ok(Head { metadata }) = server.client.request(request).await
    {
        reference.uid = metadata.uid;
        reference.resource_version = metadata.resource_version;
    }
    reference
}

/// As much of a message as the API takes.
fn cut(message: &str) -> &str {
    let end = (0..=message.len().min(MESSAGE)).rev().find(|&end| message.is_char_boundary(end));
    &message[..end.unwrap_or_default()]
}

/// Tells events of one object apart, also those of other nodes.
fn unique() -> u64 {
    use std::hash::{BuildHasher as _, RandomState};
    RandomState::new().hash_one(Timestamp::now().as_nanosecond())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_messages_are_cut_between_characters() {
        assert_eq!(cut("short"), "short");
        let long = format!("a{}", "é".repeat(MESSAGE));
        assert_eq!(cut(&long).len(), MESSAGE - 1);
    }
}
