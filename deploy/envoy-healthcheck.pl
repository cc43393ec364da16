# GET /v1/status/readyz on the public listener answers 200: exit code 0, else 1 and the first line of the answer.
# In Perl, because Envoy's image has it (perl-base is essential in Ubuntu) and has neither curl nor wget.
use strict;
use warnings;
use IO::Socket::INET;

my $port = shift // 8080;
alarm 3;
my $envoy = IO::Socket::INET->new(PeerAddr => "127.0.0.1:$port", Timeout => 2) or die "port $port: $@\n";
print $envoy "GET /v1/status/readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
my $status = <$envoy> // "no answer\n";
die $status unless $status =~ m{^HTTP/1\.1 200 };
