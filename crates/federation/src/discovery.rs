//! From a server's name to where it listens.
//!
//! <https://spec.matrix.org/v1.18/server-server-api/#resolving-server-names>

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use futures::future::{BoxFuture, Either, select};
use hyper::Uri;
use protocol::id::ServerName;
use serde::Deserialize;
use tokio::time::Instant;

/// The port of federation where nothing else is said.
const FEDERATION_PORT: u16 = 8448;
/// Redirects followed before a well-known file is given up.
const REDIRECTS_MAX: usize = 5;
/// A well-known file is one short object.
pub const WELL_KNOWN_BYTES_MAX: usize = 50 * 1024;
/// For all redirects of one well-known file together.
const WELL_KNOWN_TIMEOUT: Duration = Duration::from_secs(10);
/// Delegations remembered, by host name.
const DELEGATIONS_MAX: u64 = 20_000;
const DELEGATION_TTL: Duration = Duration::from_secs(24 * 3600);
const DELEGATION_TTL_MIN: Duration = Duration::from_secs(5 * 60);
const DELEGATION_TTL_MAX: Duration = Duration::from_secs(48 * 3600);
/// The host answered, and has no such file.
const ABSENCE_TTL: Duration = Duration::from_secs(15 * 60);
/// The host did not answer; it may just be coming up.
const SILENCE_TTL: Duration = Duration::from_secs(30);
/// How often a delegation in use is kept over a refresh that failed.
const REFRESH_FAILURES_MAX: u32 = 24;
const REFRESH_RETRY: Duration = Duration::from_secs(3600);
/// Targets of SRV records tried.
const SERVICES_MAX: usize = 8;
/// Addresses tried for one server.
pub const ADDRESSES_MAX: usize = 16;

/// One SRV record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    pub priority: u16,
    pub weight: u16,
    pub port: u16,
    pub host: String,
}

/// The two questions put to DNS. Nothing found is an empty list; an error is a failure to ask.
pub trait Dns: Send + Sync + 'static {
    fn addresses<'a>(&'a self, host: &'a str) -> BoxFuture<'a, Result<Vec<IpAddr>, String>>;
    fn services<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Vec<Service>, String>>;
}

/// What a plain HTTPS request brought, redirects not followed.
#[derive(Clone, Debug, Default)]
pub struct Page {
    pub status: u16,
    pub location: Option<String>,
    pub cache_control: Option<String>,
    pub body: Vec<u8>,
}

/// Plain HTTPS to any host, for well-known files.
pub trait Web: Send + Sync + 'static {
    fn get<'a>(&'a self, uri: &'a Uri) -> BoxFuture<'a, Result<Page, String>>;
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DiscoveryError {
    #[error("no address is known for {0}")]
    NoAddress(String),
    #[error("{0} does not offer federation")]
    NotOffered(String),
    #[error("name resolution of {host} failed: {reason}")]
    Failed { host: String, reason: String },
}

/// Finds servers, and remembers who delegates to whom. DNS answers are remembered by [`Dns`].
pub struct Discovery {
    dns: Arc<dyn Dns>,
    web: Arc<dyn Web>,
    delegations: moka::future::Cache<String, Delegation>,
}

#[derive(Clone, Debug)]
struct Delegation {
    to: Option<ServerName>,
    until: Instant,
    failures: u32,
}

impl Discovery {
    pub fn new(dns: Arc<dyn Dns>, web: Arc<dyn Web>) -> Self {
        Self {
            dns,
            web,
            delegations: moka::future::Cache::new(DELEGATIONS_MAX),
        }
    }

    /// Step 3: the name that stands in `Host` and in the certificate, and from which [`Self::locate`]
    /// goes on. It is the name itself where nothing is delegated.
    pub async fn delegate(&self, server: &ServerName) -> ServerName {
        let host = server.host();
        if server.port().is_some() || ip_literal(host).is_some() {
            return server.clone();
        }
        let known = self.delegations.get(host).await;
        if let Some(delegation) = &known
            && delegation.until > Instant::now()
        {
            return delegation.to.clone().unwrap_or_else(|| server.clone());
        }
        // Most servers delegate nothing, so their address is looked for in the meantime: by the time
        // that the file turns out to be missing, the resolver knows the answer.
        let file = Box::pin(
            self.delegations
                .entry_by_ref(host)
                .or_insert_with_if(self.ask_well_known(host, known), |held| {
                    held.until <= Instant::now()
                }),
        );
        let ahead = Box::pin(self.locate(server));
        let delegation = match select(file, ahead).await {
            Either::Left((file, _)) => file.into_value(),
            Either::Right((_, file)) => file.await.into_value(),
        };
        delegation.to.unwrap_or_else(|| server.clone())
    }

    /// Steps 1, 2, 4, 5 and 6, alike for a server's own name and for one it delegates to.
    pub async fn locate(&self, name: &ServerName) -> Result<Vec<SocketAddr>, DiscoveryError> {
        let host = name.host();
        if let Some(ip) = ip_literal(host) {
            return Ok(vec![(ip, name.port().unwrap_or(FEDERATION_PORT)).into()]);
        }
        if let Some(port) = name.port() {
            return self.addresses(host, port).await;
        }
        for service in ["_matrix-fed._tcp", "_matrix._tcp"] {
            match self.dns.services(&format!("{service}.{host}")).await {
                Ok(services) if services.is_empty() => {}
                Ok(services) => return self.locate_services(host, services).await,
                // A resolver that cannot do SRV must not cut us off from who needs none.
                Err(reason) => tracing::debug!(host, reason, "SRV look-up failed"),
            }
        }
        self.addresses(host, FEDERATION_PORT).await
    }

    async fn locate_services(
        &self,
        host: &str,
        mut services: Vec<Service>,
    ) -> Result<Vec<SocketAddr>, DiscoveryError> {
        services.retain(|service| !service.host.is_empty());
        if services.is_empty() {
            return Err(DiscoveryError::NotOffered(host.into()));
        }
        // RFC 2782: by priority; within one, a heavier target is likelier to be first.
        services.sort_by_cached_key(|service| {
            let chance = rand::random::<f64>().powf(1.0 / (f64::from(service.weight) + 0.01));
            (service.priority, std::cmp::Reverse((chance * 1e9) as u64))
        });
        let mut found = Vec::new();
        let mut failure = DiscoveryError::NoAddress(host.into());
        for service in services.iter().take(SERVICES_MAX) {
            match self.addresses(&service.host, service.port).await {
                Ok(addresses) => found.extend(addresses),
                Err(error) => failure = error,
            }
        }
        found.truncate(ADDRESSES_MAX);
        if found.is_empty() {
            Err(failure)
        } else {
            Ok(found)
        }
    }

    /// The addresses of a host by AAAA and A records, with this port.
    pub async fn addresses(
        &self,
        host: &str,
        port: u16,
    ) -> Result<Vec<SocketAddr>, DiscoveryError> {
        addresses(&*self.dns, host, port).await
    }

    async fn ask_well_known(&self, host: &str, known: Option<Delegation>) -> Delegation {
        let told = tokio::time::timeout(WELL_KNOWN_TIMEOUT, self.fetch_well_known(host)).await;
        let (to, ttl) = match told.unwrap_or(WellKnown::Silent) {
            WellKnown::Delegates { to, ttl } => (Some(to), ttl),
            WellKnown::Absent => (None, ABSENCE_TTL),
            WellKnown::Silent => {
                if let Some(Delegation {
                    to: Some(to),
                    failures,
                    ..
                }) = known
                    && failures < REFRESH_FAILURES_MAX
                {
                    return Delegation {
                        to: Some(to),
                        until: Instant::now() + REFRESH_RETRY,
                        failures: failures + 1,
                    };
                }
                (None, SILENCE_TTL)
            }
        };
        Delegation {
            to,
            until: Instant::now() + ttl,
            failures: 0,
        }
    }

    async fn fetch_well_known(&self, host: &str) -> WellKnown {
        let Ok(mut uri) = format!("https://{host}/.well-known/matrix/server").parse::<Uri>() else {
            return WellKnown::Absent;
        };
        for _ in 0..=REDIRECTS_MAX {
            let page = match self.web.get(&uri).await {
                Ok(page) => page,
                Err(reason) => {
                    tracing::debug!(host, reason, "no well-known file could be fetched");
                    return WellKnown::Silent;
                }
            };
            match page.status {
                200 => return read_well_known(&page),
                300..400 => match page.location.and_then(|l| redirect(&uri, &l)) {
                    Some(next) => uri = next,
                    None => return WellKnown::Absent,
                },
                500.. => return WellKnown::Silent,
                _ => return WellKnown::Absent,
            }
        }
        WellKnown::Absent
    }
}

enum WellKnown {
    Delegates { to: ServerName, ttl: Duration },
    Absent,
    Silent,
}

fn read_well_known(page: &Page) -> WellKnown {
    #[derive(Deserialize)]
    struct File {
        #[serde(rename = "m.server")]
        server: ServerName,
    }
    let Ok(file) = serde_json::from_slice::<File>(&page.body) else {
        return WellKnown::Absent;
    };
    WellKnown::Delegates {
        to: file.server,
        ttl: ttl_of(page.cache_control.as_deref()),
    }
}

fn ttl_of(cache_control: Option<&str>) -> Duration {
    let mut ttl = DELEGATION_TTL;
    for directive in cache_control.unwrap_or_default().split(',') {
        let directive = directive.trim().to_ascii_lowercase();
        if directive == "no-store" || directive == "no-cache" {
            return DELEGATION_TTL_MIN;
        }
        if let Some(age) = directive.strip_prefix("max-age=")
            && let Ok(seconds) = age.trim_matches('"').parse()
        {
            ttl = Duration::from_secs(seconds);
        }
    }
    ttl.clamp(DELEGATION_TTL_MIN, DELEGATION_TTL_MAX)
}

/// Where a redirect leads; only to HTTPS.
fn redirect(from: &Uri, location: &str) -> Option<Uri> {
    let target = if location.starts_with('/') && !location.starts_with("//") {
        format!("https://{}{location}", from.authority()?)
    } else if let Some(rest) = location.strip_prefix("//") {
        format!("https://{rest}")
    } else {
        location.to_owned()
    };
    let target: Uri = target.parse().ok()?;
    (target.scheme_str() == Some("https") && target.authority().is_some()).then_some(target)
}

pub(crate) async fn addresses(
    dns: &dyn Dns,
    host: &str,
    port: u16,
) -> Result<Vec<SocketAddr>, DiscoveryError> {
    if let Some(ip) = ip_literal(host) {
        return Ok(vec![(ip, port).into()]);
    }
    let found = dns
        .addresses(host)
        .await
        .map_err(|reason| DiscoveryError::Failed {
            host: host.into(),
            reason,
        })?;
    if found.is_empty() {
        return Err(DiscoveryError::NoAddress(host.into()));
    }
    Ok(found
        .into_iter()
        .take(ADDRESSES_MAX)
        .map(|ip| (ip, port).into())
        .collect())
}

pub(crate) fn ip_literal(host: &str) -> Option<IpAddr> {
    match host.strip_prefix('[').and_then(|h| h.strip_suffix(']')) {
        Some(v6) => v6.parse().ok().map(IpAddr::V6),
        None => host.parse().ok().map(IpAddr::V4),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::Mutex;

    use super::*;

    /// DNS and web by table; `asked` is what was looked for, in order.
    #[derive(Default)]
    struct World {
        hosts: BTreeMap<&'static str, &'static str>,
        srv: BTreeMap<&'static str, Vec<(u16, u16, &'static str)>>,
        pages: Mutex<BTreeMap<&'static str, Page>>,
        asked: Mutex<Vec<String>>,
    }

    impl Dns for World {
        fn addresses<'a>(&'a self, host: &'a str) -> BoxFuture<'a, Result<Vec<IpAddr>, String>> {
            let found = self.hosts.get(host).map(|ip| ip.parse().unwrap());
            Box::pin(async move { Ok(found.into_iter().collect()) })
        }

        fn services<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Vec<Service>, String>> {
            self.asked.lock().unwrap().push(name.to_owned());
            let found = self.srv.get(name).cloned().unwrap_or_default();
            Box::pin(async move {
                Ok(found
                    .into_iter()
                    .map(|(priority, port, host)| Service {
                        priority,
                        weight: 10,
                        port,
                        host: host.into(),
                    })
                    .collect())
            })
        }
    }

    impl Web for World {
        fn get<'a>(&'a self, uri: &'a Uri) -> BoxFuture<'a, Result<Page, String>> {
            self.asked.lock().unwrap().push(uri.to_string());
            let page = self
                .pages
                .lock()
                .unwrap()
                .get(uri.to_string().as_str())
                .cloned();
            Box::pin(async move { page.ok_or_else(|| "connection refused".to_owned()) })
        }
    }

    fn file(server: &str) -> Page {
        Page {
            status: 200,
            body: format!(r#"{{"m.server":"{server}"}}"#).into_bytes(),
            ..Page::default()
        }
    }

    fn moved(to: &str) -> Page {
        Page {
            status: 302,
            location: Some(to.into()),
            ..Page::default()
        }
    }

    /// Asserts that `name` is reached at `address` under the name `host`.
    async fn check(world: &Arc<World>, name: &str, host: &str, address: &str) {
        let discovery = Discovery::new(world.clone(), world.clone());
        let delegated = discovery.delegate(&ServerName::parse(name).unwrap()).await;
        let found = discovery.locate(&delegated).await;
        assert_eq!(
            (delegated.as_str(), found.map(|f| f[0].to_string())),
            (host, Ok(address.into())),
            "{name}"
        );
    }

    fn world() -> World {
        World {
            hosts: BTreeMap::from([
                ("a.org", "1.0.0.1"),
                ("b.org", "1.0.0.2"),
                ("c.org", "1.0.0.3"),
            ]),
            ..World::default()
        }
    }

    #[tokio::test]
    async fn an_ip_literal_is_its_own_answer() {
        let world = Arc::new(world());
        check(&world, "1.2.3.4", "1.2.3.4", "1.2.3.4:8448").await;
        check(&world, "1.2.3.4:1", "1.2.3.4:1", "1.2.3.4:1").await;
        check(&world, "[::1]", "[::1]", "[::1]:8448").await;
        check(&world, "[::1]:9", "[::1]:9", "[::1]:9").await;
        assert!(world.asked.lock().unwrap().is_empty());
    }

    #[tokio::test]
    async fn an_explicit_port_asks_for_neither_file_nor_service() {
        let world = Arc::new(world());
        check(&world, "a.org:99", "a.org:99", "1.0.0.1:99").await;
        assert!(world.asked.lock().unwrap().is_empty());
    }

    #[tokio::test]
    async fn a_file_delegates_to_a_literal_a_port_a_service_or_a_host() {
        for (to, srv, address) in [
            ("9.9.9.9", None, "9.9.9.9:8448"),
            ("9.9.9.9:5", None, "9.9.9.9:5"),
            ("b.org:77", None, "1.0.0.2:77"),
            ("b.org", Some("_matrix-fed._tcp.b.org"), "1.0.0.3:443"),
            ("b.org", Some("_matrix._tcp.b.org"), "1.0.0.3:443"),
            ("b.org", None, "1.0.0.2:8448"),
        ] {
            let mut world = world();
            world
                .pages
                .get_mut()
                .unwrap()
                .insert("https://a.org/.well-known/matrix/server", file(to));
            if let Some(name) = srv {
                world.srv.insert(name, vec![(1, 443, "c.org")]);
            }
            check(&Arc::new(world), "a.org", to, address).await;
        }
    }

    #[tokio::test]
    async fn without_a_file_services_are_tried_and_then_the_port() {
        let mut one = world();
        one.srv
            .insert("_matrix._tcp.a.org", vec![(1, 443, "b.org")]);
        check(&Arc::new(one), "a.org", "a.org", "1.0.0.2:443").await;
        check(&Arc::new(world()), "a.org", "a.org", "1.0.0.1:8448").await;
    }

    #[tokio::test]
    async fn the_registered_service_name_goes_before_the_old_one_and_low_priority_first() {
        let mut world = world();
        world.srv.insert(
            "_matrix-fed._tcp.a.org",
            vec![(20, 1, "b.org"), (10, 2, "c.org")],
        );
        world
            .srv
            .insert("_matrix._tcp.a.org", vec![(1, 443, "b.org")]);
        check(&Arc::new(world), "a.org", "a.org", "1.0.0.3:2").await;
    }

    #[tokio::test]
    async fn a_service_at_the_root_means_no_federation() {
        let mut world = world();
        world.srv.insert("_matrix-fed._tcp.a.org", vec![(0, 0, "")]);
        let world = Arc::new(world);
        let discovery = Discovery::new(world.clone(), world);
        assert_eq!(
            discovery.locate(&ServerName::parse("a.org").unwrap()).await,
            Err(DiscoveryError::NotOffered("a.org".into()))
        );
    }

    #[tokio::test]
    async fn redirects_are_followed_but_not_for_ever_and_not_off_https() {
        let first = "https://a.org/.well-known/matrix/server";
        let mut good = world();
        good.pages.get_mut().unwrap().extend([
            (first, moved("/other")),
            ("https://a.org/other", moved("//c.org/file")),
            ("https://c.org/file", file("b.org:1")),
        ]);
        check(&Arc::new(good), "a.org", "b.org:1", "1.0.0.2:1").await;
        for bad in [first, "http://c.org/file", "ftp:x"] {
            let mut world = world();
            world
                .pages
                .get_mut()
                .unwrap()
                .extend([(first, moved(bad)), ("http://c.org/file", file("b.org:1"))]);
            check(&Arc::new(world), "a.org", "a.org", "1.0.0.1:8448").await;
        }
    }

    #[tokio::test]
    async fn a_bad_file_is_no_file() {
        for body in ["", "[]", r#"{"m.server":1}"#, r#"{"m.server":"a b"}"#, "{}"] {
            let mut world = world();
            world.pages.get_mut().unwrap().insert(
                "https://a.org/.well-known/matrix/server",
                Page {
                    status: 200,
                    body: body.into(),
                    ..Page::default()
                },
            );
            check(&Arc::new(world), "a.org", "a.org", "1.0.0.1:8448").await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_delegation_is_remembered_and_outlives_a_failed_refresh() {
        let page = "https://a.org/.well-known/matrix/server";
        let mut world = world();
        world.pages.get_mut().unwrap().insert(page, file("b.org:1"));
        let world = Arc::new(world);
        let discovery = Discovery::new(world.clone(), world.clone());
        let name = ServerName::parse("a.org").unwrap();
        for _ in 0..3 {
            assert_eq!(discovery.delegate(&name).await.as_str(), "b.org:1");
        }
        let fetched = |world: &World| {
            let asked = world.asked.lock().unwrap();
            asked.iter().filter(|a| a.as_str() == page).count()
        };
        assert_eq!(fetched(&world), 1);
        world.pages.lock().unwrap().clear();
        tokio::time::advance(DELEGATION_TTL_MAX).await;
        assert_eq!(discovery.delegate(&name).await.as_str(), "b.org:1");
        assert_eq!(fetched(&world), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_host_is_asked_again_soon() {
        let world = Arc::new(world());
        let discovery = Discovery::new(world.clone(), world.clone());
        let name = ServerName::parse("a.org").unwrap();
        assert_eq!(discovery.delegate(&name).await.as_str(), "a.org");
        world
            .pages
            .lock()
            .unwrap()
            .insert("https://a.org/.well-known/matrix/server", file("b.org:1"));
        assert_eq!(discovery.delegate(&name).await.as_str(), "a.org");
        tokio::time::advance(SILENCE_TTL).await;
        assert_eq!(discovery.delegate(&name).await.as_str(), "b.org:1");
    }

    #[test]
    fn cache_control_is_respected_within_bounds() {
        for (header, ttl) in [
            (None, DELEGATION_TTL),
            (Some("public, max-age=7200"), Duration::from_secs(7200)),
            (Some("max-age=1"), DELEGATION_TTL_MIN),
            (Some("max-age=99999999"), DELEGATION_TTL_MAX),
            (Some("No-Store"), DELEGATION_TTL_MIN),
            (Some("max-age=many"), DELEGATION_TTL),
        ] {
            assert_eq!(ttl_of(header), ttl, "{header:?}");
        }
    }
}
