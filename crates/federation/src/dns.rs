//! The system's hosts file and name servers, and no others.

use std::net::IpAddr;
use std::time::Duration;

use futures::future::BoxFuture;
use hickory_resolver::config::{LookupIpStrategy, ResolveHosts, ResolverConfig, ResolverOpts};
use hickory_resolver::net::NetError;
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::proto::op::Query;
use hickory_resolver::proto::rr::{Name, RData, RecordType};
use hickory_resolver::{Hosts, TokioResolver};

use crate::discovery::{Dns, Service};

/// Answers of name servers kept, in number of responses.
const DNS_CACHE_MAX: u64 = 10_000;
/// A server that comes up is found again within this time.
const NEGATIVE_TTL_MAX: Duration = Duration::from_secs(30);
const POSITIVE_TTL_MAX: Duration = Duration::from_secs(24 * 3600);
/// For each try of each name server; there are two tries.
const DNS_TIMEOUT: Duration = Duration::from_secs(3);

/// The system's configuration as it stood when this was built.
pub struct SystemDns {
    hosts: Hosts,
    resolver: TokioResolver,
}

#[derive(Debug, thiserror::Error)]
#[error("cannot set up name resolution: {0}")]
pub struct DnsSetupError(String);

impl SystemDns {
    /// Reads the hosts file and resolv.conf. A resolv.conf that cannot be read leaves the hosts file
    /// alone in use: a server must not talk to somebody's public resolver behind its operator's back.
    pub fn from_system() -> Result<Self, DnsSetupError> {
        let hosts = Hosts::from_system().unwrap_or_else(|error| {
            tracing::warn!(%error, "the hosts file cannot be read");
            Hosts::default()
        });
        let (config, mut options) = hickory_resolver::system_conf::read_system_conf()
            .unwrap_or_else(|error| {
                tracing::warn!(%error, "resolv.conf cannot be read: only the hosts file is used");
                (
                    ResolverConfig::from_parts(None, Vec::new(), Vec::new()),
                    ResolverOpts::default(),
                )
            });
        options.use_hosts_file = ResolveHosts::Always;
        options.ip_strategy = LookupIpStrategy::Ipv4AndIpv6;
        options.cache_size = DNS_CACHE_MAX;
        options.negative_max_ttl = Some(NEGATIVE_TTL_MAX);
        options.positive_max_ttl = Some(POSITIVE_TTL_MAX);
        options.timeout = options.timeout.min(DNS_TIMEOUT);
        let mut builder =
            TokioResolver::builder_with_config(config, TokioRuntimeProvider::default());
        *builder.options_mut() = options;
        let resolver = builder.build().map_err(|e| DnsSetupError(e.to_string()))?;
        Ok(Self { hosts, resolver })
    }

    /// Asked first and by itself, so that a name in the hosts file never waits for a name server.
    fn hosts_file_addresses(&self, host: &str) -> Vec<IpAddr> {
        let Ok(name) = Name::from_ascii(host.to_ascii_lowercase()) else {
            return Vec::new();
        };
        [RecordType::A, RecordType::AAAA]
            .into_iter()
            .filter_map(|kind| {
                self.hosts
                    .lookup_static_host(&Query::query(name.clone(), kind))
            })
            .flat_map(|lookup| {
                lookup
                    .answers()
                    .iter()
                    .filter_map(|record| record.data.ip_addr())
                    .collect::<Vec<_>>()
            })
            .collect()
    }
}

impl Dns for SystemDns {
    fn addresses<'a>(&'a self, host: &'a str) -> BoxFuture<'a, Result<Vec<IpAddr>, String>> {
        Box::pin(async move {
            let known = self.hosts_file_addresses(host);
            if !known.is_empty() {
                return Ok(known);
            }
            match self.resolver.lookup_ip(host).await {
                Ok(found) => Ok(found.iter().collect()),
                Err(error) if is_absence(&error) => Ok(Vec::new()),
                Err(error) => Err(error.to_string()),
            }
        })
    }

    fn services<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Vec<Service>, String>> {
        Box::pin(async move {
            // With the final dot: a search list has no business with the name of a service.
            match self.resolver.srv_lookup(format!("{name}.")).await {
                Ok(found) => Ok(found
                    .answers()
                    .iter()
                    .filter_map(|record| match &record.data {
                        RData::SRV(srv) => Some(Service {
                            priority: srv.priority,
                            weight: srv.weight,
                            port: srv.port,
                            host: srv.target.to_ascii().trim_end_matches('.').to_owned(),
                        }),
                        _ => None,
                    })
                    .collect()),
                Err(error) if is_absence(&error) => Ok(Vec::new()),
                Err(error) => Err(error.to_string()),
            }
        })
    }
}

fn is_absence(error: &NetError) -> bool {
    error.is_no_records_found() || error.is_nx_domain()
}
