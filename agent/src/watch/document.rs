//! The text of a file to the objects in it: documents are told apart before any is parsed, so that one that does not
//! parse does not take others with it.

use std::fmt;
use std::time::SystemTime;

use serde::de::{DeserializeOwned, DeserializeSeed, Deserializer};
use serde_json::{Map, Value};

use super::convert::{self, LABEL, SUBDOMAIN, TRIGGER};
use super::list::Objects;
use super::{Invalid, Problem, cluster_policy, policy};
use crate::model::{Change, Kind, Name, ObjectId};

/// One object of a document, or why it is none.
#[derive(Debug)]
pub(super) enum Item {
    Object {
        id: ObjectId,
        change: Change,
        /// When that which it says came about in the cluster, where it says so.
        triggered: Option<SystemTime>,
    },
    /// A kind that is not read, by its name and version.
    Ignored(String),
    /// An object that is wrong; what it was before stays.
    Bad {
        id: ObjectId,
        problem: Problem,
        /// What is in force where there was nothing before.
        instead: Option<Box<Change>>,
    },
    /// Something that might be any object.
    Unknown(Problem),
}

/// The documents of a file that have content, with the line where each starts.
pub(super) fn split(text: &str) -> Vec<(usize, &str)> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut documents = Vec::new();
    let (mut start, mut first_line, mut offset) = (0, 1, 0);
    for (index, line) in text.split_inclusive('\n').enumerate() {
        if line
            .strip_prefix("---")
            .is_some_and(|rest| rest.is_empty() || rest.starts_with(char::is_whitespace))
        {
            documents.push((first_line, &text[start..offset]));
            (start, first_line) = (offset, index + 1);
        }
        offset += line.len();
    }
    documents.push((first_line, &text[start..]));
    documents.retain(|(_, document)| !is_blank(document));
    documents
}

/// The objects of one document; a `List` holds several. `place` says where the document is.
pub(super) fn parse(text: &str, (place, first_line): (&str, usize), node: &str) -> Vec<Item> {
    let parse = |text: &str| {
        let objects = Objects { place, node };
        serde_saphyr::with_deserializer_from_str_with_options(text, options(), |it| objects.deserialize(it))
    };
    parse(text).unwrap_or_else(|error| {
        // Once more at the place it has in the file, so that the error says lines of the file.
        let error = parse(&("\n".repeat(first_line - 1) + text)).err().unwrap_or(error);
        vec![Item::Unknown(problem(place, format!("cannot be read: {}", error.without_snippet())))]
    })
}

/// `None` for a kind that is passed over.
fn kind_of(version: &str, kind: &str) -> Option<Kind> {
    match (version, kind) {
        ("v1", "Service") => Some(Kind::Service),
        ("discovery.k8s.io/v1", "EndpointSlice") => Some(Kind::EndpointSlice),
        ("v1", "Node") => Some(Kind::Node),
        ("v1", "Pod") => Some(Kind::Pod),
        ("networking.k8s.io/v1", "ServiceCIDR") => Some(Kind::ServiceCidr),
        ("v1", "Namespace") => Some(Kind::Namespace),
        ("networking.k8s.io/v1", "NetworkPolicy") => Some(Kind::NetworkPolicy),
        ("policy.networking.k8s.io/v1alpha2", "ClusterNetworkPolicy") => Some(Kind::ClusterNetworkPolicy),
        _ => None,
    }
}

/// The object of a kind, wherever it is read from.
///
/// # Errors
/// The first field that is of another type or makes no sense, as text.
pub(super) fn change<'de, D>(kind: Kind, value: D, node: &str) -> Result<Change, String>
where
    D: Deserializer<'de>,
    D::Error: fmt::Display,
{
    match kind {
        Kind::Service => typed(value, convert::service),
        Kind::EndpointSlice => typed(value, |object| convert::endpoint_slice(object, node)),
        Kind::Node => typed(value, convert::node),
        Kind::Pod => typed(value, convert::pod),
        Kind::ServiceCidr => typed(value, convert::service_cidr),
        Kind::Namespace => typed(value, policy::namespace),
        Kind::NetworkPolicy => typed(value, policy::network_policy),
        Kind::ClusterNetworkPolicy => typed(value, cluster_policy::cluster_network_policy),
    }
}

pub(super) fn name_limit(kind: Kind) -> usize {
    match kind {
        Kind::Service | Kind::Namespace => LABEL,
        Kind::EndpointSlice
        | Kind::Node
        | Kind::Pod
        | Kind::ServiceCidr
        | Kind::NetworkPolicy
        | Kind::ClusterNetworkPolicy => SUBDOMAIN,
    }
}

/// The Service that an object is, or of which it is a part.
pub(super) fn service_of(id: &ObjectId, metadata: &Map<String, Value>) -> Option<Name> {
    match id.kind {
        Kind::Service => Some(id.name.clone()),
        Kind::EndpointSlice => {
            let labels = metadata.get("labels")?.as_object()?;
            let name = text_of(labels, "kubernetes.io/service-name");
            (!name.is_empty()).then(|| Name::new(id.name.namespace.clone(), name))
        }
        Kind::Node
        | Kind::Pod
        | Kind::ServiceCidr
        | Kind::Namespace
        | Kind::NetworkPolicy
        | Kind::ClusterNetworkPolicy => None,
    }
}

fn typed<'de, T: DeserializeOwned, D: Deserializer<'de>>(
    value: D,
    convert: impl FnOnce(&T) -> Result<Change, Invalid>,
) -> Result<Change, String>
where
    D::Error: fmt::Display,
{
    let object: T = serde_path_to_error::deserialize(value).map_err(|error| error.to_string())?;
    convert(&object).map_err(|error| error.to_string())
}

/// One object, given as a whole.
pub(super) fn item(value: Value, place: &str, node: &str) -> Item {
    let bad = |message: &str| Item::Unknown(problem(place, message.to_owned()));
    let Some(fields) = value.as_object() else { return bad("this is no Kubernetes object") };
    let (version, kind) = (text_of(fields, "apiVersion"), text_of(fields, "kind"));
    if version.is_empty() || kind.is_empty() {
        return bad("apiVersion or kind is missing: this is no Kubernetes object");
    }
    let Some(kind) = kind_of(version, kind) else {
        return Item::Ignored(format!("{kind} ({version})"));
    };
    let Some(metadata) = fields.get("metadata").and_then(Value::as_object) else {
        return bad("metadata: is missing: every object has a name there");
    };
    if let Some(name) = metadata.get("name").filter(|name| !name.is_string() && !name.is_null()) {
        return bad(&format!("metadata.name: {name} is not text: put it in quotes"));
    }
    let cluster_wide =
        matches!(kind, Kind::Node | Kind::Namespace | Kind::ServiceCidr | Kind::ClusterNetworkPolicy);
    let namespace = Some(text_of(metadata, "namespace")).filter(|text| !text.is_empty() && !cluster_wide);
    let id = match convert::name(namespace, text_of(metadata, "name"), name_limit(kind)) {
        Ok(name) => ObjectId { kind, name },
        Err(invalid) => return Item::Unknown(problem(place, invalid.to_string())),
    };
    let service = service_of(&id, metadata);
    let instead = instead(&id, &value).map(Box::new);
    let annotations = metadata.get("annotations").and_then(Value::as_object);
    let triggered = annotations.and_then(|annotations| convert::trigger(text_of(annotations, TRIGGER)));
    match change(kind, value, node) {
        Ok(change) => Item::Object { id, change, triggered },
        Err(message) => {
            let problem = problem(&format!("{place}, {id}"), message);
            let problem = Problem { object: Some(id.clone()), service, ..problem };
            Item::Bad { id, problem, instead }
        }
    }
}

/// What is in force in place of an object that has never made sense, where that is not nothing.
pub(super) fn instead(id: &ObjectId, object: &Value) -> Option<Change> {
    match id.kind {
        Kind::NetworkPolicy => Some(policy::closed(id.name.clone(), object)),
        Kind::ClusterNetworkPolicy => Some(cluster_policy::closed(&id.name, object)),
        Kind::Service
        | Kind::EndpointSlice
        | Kind::Node
        | Kind::Pod
        | Kind::ServiceCidr
        | Kind::Namespace => None,
    }
}

pub(super) fn problem(place: &str, message: String) -> Problem {
    Problem { place: place.into(), message: message.into(), object: None, service: None }
}

pub(super) fn text_of<'a>(fields: &'a Map<String, Value>, field: &str) -> &'a str {
    fields.get(field).and_then(Value::as_str).unwrap_or_default()
}

/// Nothing but comments, directives and markers.
fn is_blank(document: &str) -> bool {
    document.lines().map(str::trim).all(|line| {
        line.is_empty()
            || line.starts_with(['#', '%'])
            || line == "---"
            || line == "..."
            || line.starts_with("--- #")
    })
}

/// The library's bounds suit a configuration file; a `List` of a whole cluster is larger. What bounds the expansion
/// of anchors stays.
fn options() -> serde_saphyr::Options {
    serde_saphyr::options! {
        with_snippet: false,
        budget: serde_saphyr::budget! {
            max_events: 40_000_000,
            max_nodes: 20_000_000,
            max_total_scalar_bytes: 512 << 20,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Vec<String> {
        let documents = split(text);
        let items = documents.iter().flat_map(|(line, document)| parse(document, ("f.yaml", *line), "here"));
        items
            .map(|item| match item {
                Item::Object { id, .. } => id.to_string(),
                Item::Ignored(kind) => format!("ignored {kind}"),
                Item::Bad { id, problem, instead: _ } => format!("bad {id}: {problem}"),
                Item::Unknown(problem) => format!("unknown: {problem}"),
            })
            .collect()
    }

    const SERVICE: &str = "apiVersion: v1\nkind: Service\nmetadata: {name: web}\n";

    #[test]
    fn documents_are_split_at_markers_and_numbered_by_content() {
        let text = "\u{feff}# head\n---\na: 1\n---   # second\r\nb: |\n  ---\n  x\n---\n\n--- {c: 3}\n----\n";
        assert_eq!(
            split(text),
            [(2, "---\na: 1\n"), (4, "---   # second\r\nb: |\n  ---\n  x\n"), (10, "--- {c: 3}\n----\n")]
        );
        assert_eq!(split("%YAML 1.2\n---\na: 1").len(), 1);
        assert_eq!(split("").len(), 0);
    }

    #[test]
    fn one_document_that_does_not_parse_leaves_the_others() {
        let text = format!("{SERVICE}---\nkind: [\n---\n{}", SERVICE.replace("web", "next"));
        let items = parsed(&text);
        assert_eq!((items.len(), &*items[0], &*items[2]), (3, "Service default/web", "Service default/next"));
        assert_eq!(items[1], "unknown: f.yaml: cannot be read: unclosed bracket '[' at line 5, column 7");
        assert_eq!(
            parsed("apiVersion: v1\nkind: Service\nmetadata: {name: no}"),
            ["unknown: f.yaml: metadata.name: false is not text: put it in quotes"]
        );
    }

    #[test]
    fn lists_hold_objects() {
        let typed =
            "apiVersion: v1\nkind: ServiceList\nitems: [{metadata: {name: a}}, {metadata: {name: b}}]";
        assert_eq!(parsed(typed), ["Service default/a", "Service default/b"]);
        let mixed = "apiVersion: v1\nkind: List\nitems:\n- {apiVersion: v1, kind: Node, metadata: {name: n1}}\n\
                     - {apiVersion: v1, kind: Secret, metadata: {name: s}}\n- 7\n";
        assert_eq!(
            parsed(mixed),
            ["Node n1", "ignored Secret (v1)", "unknown: f.yaml, items[2]: this is no Kubernetes object"]
        );
    }

    #[test]
    fn a_list_is_known_by_its_kind_wherever_that_stands() {
        let last = "apiVersion: v1\nitems: [{metadata: {name: a}}]\nkind: ServiceList\n";
        assert_eq!(parsed(last), ["Service default/a"]);
        assert_eq!(parsed("apiVersion: v1\nkind: List\nitems:\n"), [""; 0]);
        for other in ["{a: 1}", "[{kind: Service}]", "text", "7", "-7", "0.5", "true", "null"] {
            let text = format!("apiVersion: example.com/v1\nkind: Basket\nitems: {other}\n");
            assert_eq!(parsed(&text), ["ignored Basket (example.com/v1)"], "{other}");
        }
        assert_eq!(
            parsed("just text"),
            [
                "unknown: f.yaml: cannot be read: invalid type: string \"just text\", expected a Kubernetes object"
            ]
        );
    }

    #[test]
    fn an_error_names_place_object_and_field() {
        let bad = |ports: &str| {
            parsed(&format!("{SERVICE}spec: {{clusterIP: 10.96.0.1, ports: {ports}}}")).remove(0)
        };
        assert_eq!(
            bad("[{port: 80, name: a}, {port: 70000, name: b}]"),
            "bad Service default/web: f.yaml, Service default/web: spec.ports[1].port: 70000 is not a port (1-65535)"
        );
        let message = bad("[{port: eighty}]");
        assert!(message.contains("spec.ports[0].port: invalid type: string \"eighty\""), "{message}");
        assert_eq!(
            parsed("apiVersion: v1\nkind: Pod\n")[0],
            "unknown: f.yaml: metadata: is missing: every object has a name there"
        );
    }

    #[test]
    fn json_and_quirks_of_yaml_parse() {
        let json = r#"{"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"},
            "spec": {"clusterIP": "10.96.0.1", "ports": [{"port": 80, "targetPort": "http"}]}}"#;
        assert_eq!(parsed(json), ["Service default/web"]);
        let anchors = "x: &p {port: 80}\napiVersion: v1\nkind: Service\nmetadata: {name: web, creationTimestamp: null}\n\
                       spec: {clusterIP: 10.96.0.1, ports: [*p]}\nstatus: {}\n...\n";
        assert_eq!(parsed(anchors), ["Service default/web"]);
        let twice = format!("{SERVICE}kind: Pod\n");
        assert!(
            parsed(&twice)[0].contains("cannot be read"),
            "a key that stands twice: {:?}",
            parsed(&twice)
        );
    }
}
